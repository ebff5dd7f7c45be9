"""LLaVA and its like: a tower, a projector, and images as tiles or whole."""

from __future__ import annotations

from vlmray.models.families.base import Family, Layout

_TILES = Layout(ragged={"pixel_values": (1,)})  # how many there are, `image_sizes` tells
_HEIGHT_AND_WIDTH = Layout(ragged={"pixel_values": (2, 3)})  # cropped by `image_sizes`

FAMILIES = (
    Family(model_types=("llava",), shares_prefix=True),
    Family(model_types=("llava_next", "llava_onevision"), layout=_TILES, shares_prefix=True),
    Family(
        model_types=("mistral3", "pixtral"),
        needs=("torchvision",),
        layout=_HEIGHT_AND_WIDTH,
        shares_prefix=True,
    ),
)
