"""What the package asks of a family of models, and what holds for all of them."""

from __future__ import annotations

from typing import Any

import torch

from vlmray.models.families.patch_embedding import embed_patches_by_matmul


class Family:
    """What is known of the models of a family; here, of any: they run whole rows, as transformers does.

    A family of its own says what more is known to give the same answers, and tests show that it does.
    """

    shares_prefix: bool = False
    """Whether copied and selected rows of the cache give the answers of whole rows; then images have to go
    through `vlmray.models.vision` as well."""

    takes_image_features: bool = False
    """Whether training on features that were kept is training on pixels; needs `vision_tower`."""

    packs_attention: bool = False
    """Whether the tower passes windows and images to its attention function packed."""

    def prepare(self, model: Any) -> None:
        """Make a model faster that was just loaded; what it computes stays the same."""
        embed_patches_by_matmul(model)

    def vision_tower(self, model: Any) -> Any:
        """Return the part that makes features of images, whatever projects them included."""
        raise NotImplementedError(f"nothing is known of the vision tower of {type(model).__name__}")

    def keep_rows(self, model: Any, kept: torch.Tensor) -> None:
        """Keep some rows, by their places (B,), of what a base model remembers beside its cache."""
