"""Llama 3.2 Vision, whose text looks at images through layers of cross-attention."""

from __future__ import annotations

from vlmray.models.families.base import Family, Layout

_IMAGES = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")

FAMILIES = (
    Family(
        model_types=("mllama",),
        lora={"merger": r"model\.multi_modal_projector"},
        layout=Layout(
            fills={"cross_attention_mask": "last"},
            ragged={**dict.fromkeys(_IMAGES, (1,)), "cross_attention_mask": (2,)},
            # Text before its image attends to all that is there, padding too.
            pads_exactly=False,
            whole_rows=frozenset({*_IMAGES, "cross_attention_mask"}),
        ),
    ),
)
