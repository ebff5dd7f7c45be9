"""GLM-V, whose template writes no end of a turn: the next role is it."""

from __future__ import annotations

from vlmray.models.families.base import Family

# PEFT turns a pattern into suffixes for a mixture, and takes every gate_proj, up_proj and down_proj for one
# of its experts; what is left to name is what no other part has a name in common with.
_OUTSIDE_EXPERTS = {
    "language": r"model\.language_model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    "vision": r"model\.visual\.blocks\.\d+\.attn\.qkv",
    "merger": r"(?!)",
}

FAMILIES = (
    Family(
        model_types=("glm4v", "glm46v"), end_token="<|user|>", shares_prefix=True, takes_image_features=True
    ),
    Family(
        model_types=("glm4v_moe",),
        end_token="<|user|>",
        shares_prefix=True,
        takes_image_features=True,
        lora=_OUTSIDE_EXPERTS,
    ),
)
