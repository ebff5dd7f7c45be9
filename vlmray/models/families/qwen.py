"""The Qwen-VL line, whose images are patches and positions have three axes."""

from __future__ import annotations

from vlmray.models.families.base import Family

FAMILIES = (
    Family(model_types=("qwen2_5_vl",), shares_prefix=True, takes_image_features=True, packs_attention=True),
    Family(model_types=("qwen2_vl",), shares_prefix=True, takes_image_features=True),
    Family(model_types=("qwen3_vl", "qwen3_vl_moe"), shares_prefix=True, takes_image_features=True),
    Family(
        model_types=("qwen3_5", "qwen3_5_moe"), takes_image_features=True
    ),  # layers of theirs are recurrent
)
