"""Qwen2.5-VL."""

from __future__ import annotations

from typing import Any

import torch

from vlmray.models.families.base import Family


class Qwen25VL(Family):
    """Known in full: this is the family that the package was made for."""

    shares_prefix = True
    takes_image_features = True
    packs_attention = True

    def vision_tower(self, model: Any) -> Any:
        """Return the part that makes features of images; its merger is in it."""
        return model.model.visual

    def keep_rows(self, model: Any, kept: torch.Tensor) -> None:
        """Keep how far the positions of rows are behind their lengths: an image takes few positions."""
        model.model.rope_deltas = model.model.rope_deltas[kept]
