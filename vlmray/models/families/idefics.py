"""Idefics3 and SmolVLM, which cut an image into a row of tiles and drop tiles of zeros."""

from __future__ import annotations

from vlmray.models.families.base import Family, Layout

_PIXELS = ("pixel_values", "pixel_attention_mask")
_TILES = Layout(ragged=dict.fromkeys(_PIXELS, (1,)), whole_rows=frozenset(_PIXELS))

FAMILIES = (
    Family(model_types=("idefics3",), layout=_TILES, shares_prefix=True),
    Family(model_types=("smolvlm",), layout=_TILES, needs=("torchvision", "num2words"), shares_prefix=True),
)
