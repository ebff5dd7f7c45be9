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
    """Return what the tower makes of each image: (visual tokens, levels x width of the language model).

    A level is what goes into one layer of the language model, of most towers into the first alone.

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
        outputs = model.get_image_features(part, grids[start:end])
        levels = [outputs.pooler_output, *(getattr(outputs, "deepstack_features", None) or [])]
        features += [torch.cat(image, dim=-1) for image in zip(*levels, strict=True)]
    return features


def count_levels(config: Any) -> int:
    """Return how many layers of the language model read what the tower makes, by the model's config."""
    return 1 + len(getattr(config.vision_config, "deepstack_visual_indexes", ()))


def replace_pixels(
    batch: dict[str, Any], features: Sequence[torch.Tensor], num_levels: int = 1
) -> dict[str, Any]:
    """Put what the tower made of a batch's images in the place of their pixels, as `forward` takes it."""
    levels = zip(*(image.chunk(num_levels, dim=-1) for image in features), strict=True)
    first, *others = [list(level) for level in levels] if num_levels > 1 else [features]
    outputs: Any = BaseModelOutputWithPooling(pooler_output=first)  # type: ignore[arg-type]
    if others:
        outputs.deepstack_features = others
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
