"""What a vision tower makes of images, computed apart from the language model that reads it.

Shapes: `I` images, `P` patches of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.versions import require_version

# Before it, `forward` took what `replace_pixels` gives it without a word and saw no image.
require_version("transformers>=5.18", "Install it: pip install -U 'transformers>=5.18,<6'")

PATCHES_PER_PASS = 8192
"""Of a pass through the tower. More are no faster, and their activations are what takes most memory."""


def encode_images(
    model: Any, pixels: torch.Tensor, grids: torch.Tensor, *, num_patches: int = PATCHES_PER_PASS
) -> list[torch.Tensor]:
    """Return what the tower makes of each image: (visual tokens, width of the language model).

    Args:
        model: The base model, of a type with `get_image_features`.
        pixels: (P, ...) patches of all images, one after the other.
        grids: (I, 3) patches of each in time, height and width.
        num_patches: Most patches in one pass; a larger image goes alone.
    """
    features: list[torch.Tensor] = []
    for start, end in _passes(sizes := grids.prod(-1).tolist(), num_patches):
        first = sum(sizes[:start])
        part = pixels[first : first + sum(sizes[start:end])]
        features += model.get_image_features(part, grids[start:end]).pooler_output
    return features


def replace_pixels(batch: dict[str, Any], features: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Put what the tower made of a batch's images in the place of their pixels, as `forward` takes it."""
    outputs: Any = BaseModelOutputWithPooling(pooler_output=features)  # type: ignore[arg-type]
    return {
        **{name: value for name, value in batch.items() if name != "pixel_values"},
        "mm_encoder_outputs": {"image": outputs},
    }


def _passes(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Cut images of these sizes into ranges: at least one image, as many as `most` allows."""
    start = total = 0
    for place, size in enumerate(sizes):
        if place > start and total + size > most:
            yield start, place
            start, total = place, 0
        total += size
    if sizes:
        yield start, len(sizes)
