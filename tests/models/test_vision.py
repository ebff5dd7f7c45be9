"""Images go through the tower a few at a time, and come out as if all had gone together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlmray.models.vision import encode_images, replace_pixels

GRIDS = torch.tensor([[1, 2, 2], [1, 4, 2], [1, 2, 2], [1, 6, 4], [1, 2, 2]])


class Tower:
    """Stands in for a model; a patch's feature is twice its value. It notes the patches of each pass."""

    def __init__(self) -> None:
        self.passes: list[int] = []

    def get_image_features(self, pixels: torch.Tensor, grids: torch.Tensor) -> Any:
        self.passes.append(len(pixels))
        return SimpleNamespace(pooler_output=(2 * pixels).split(grids.prod(-1).tolist()))


@pytest.mark.parametrize(
    ("num_patches", "passes"), [(1, [4, 8, 4, 24, 4]), (12, [12, 4, 24, 4]), (100, [44])]
)
def test_a_pass_holds_as_many_images_as_fit(num_patches: int, passes: list[int]) -> None:
    tower = Tower()
    pixels = torch.randn(44, 3)
    features = encode_images(tower, pixels, GRIDS, num_patches=num_patches)
    assert tower.passes == passes
    assert [len(each) for each in features] == GRIDS.prod(-1).tolist()
    assert torch.equal(torch.cat(features), 2 * pixels)


def test_no_images_need_no_pass() -> None:
    assert encode_images(Tower(), torch.empty(0, 3), GRIDS[:0]) == []


def test_features_take_the_place_of_pixels() -> None:
    batch = {"input_ids": torch.ones(1, 3), "pixel_values": torch.ones(4, 3)}
    features = [torch.ones(1, 2)]
    replaced = replace_pixels(batch, features)
    assert replaced.keys() == {"input_ids", "mm_encoder_outputs"}
    assert replaced["mm_encoder_outputs"]["image"].pooler_output is features
    assert "pixel_values" in batch
