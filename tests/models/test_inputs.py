"""Joining rows and segments, on tensors small enough to read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlmray.models.inputs import chain_segments, join_rows, row_signature


def row(*ids: int, **others: Any) -> dict[str, torch.Tensor]:
    tensors = {name: torch.tensor(value) for name, value in others.items()}
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)), **tensors}


def lists(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in batch.items()}


LONG = row(5, 6, 7, kinds=[[0, 1, 1]], labels=[[-100, 6, 7]], pixel_values=[[0.5, 0.5], [1.0, 1.0]])
SHORT = row(8, labels=[[8]])


@pytest.mark.parametrize(
    ("side", "ids", "labels", "mask"),
    [
        ("left", [9, 9, 8], [-100, -100, 8], [0, 0, 1]),
        ("right", [8, 9, 9], [8, -100, -100], [1, 0, 0]),
    ],
)
def test_rows_are_padded_on_the_side_asked_for_each_tensor_with_its_own_filling(
    side: Any, ids: list[int], labels: list[int], mask: list[int]
) -> None:
    assert lists(join_rows([LONG, SHORT], pad_id=9, side=side)) == {
        "input_ids": [[5, 6, 7], ids],
        "attention_mask": [[1, 1, 1], mask],
        "kinds": [[0, 1, 1], [0, 0, 0]],
        "labels": [[-100, 6, 7], labels],
        "pixel_values": [[0.5, 0.5], [1.0, 1.0]],
    }


def test_image_tensors_are_laid_end_to_end_in_row_order() -> None:
    rows = [row(1, 2, 3, pixel_values=[[float(n)]] * n) for n in (1, 2)]
    assert join_rows(rows, pad_id=0, side="left")["pixel_values"].tolist() == [[1.0], [2.0], [2.0]]


def test_image_tensors_that_do_not_fit_together_are_refused() -> None:
    rows = [row(1, 2, 3, pixel_values=[[0.0] * n]) for n in (4, 5)]
    assert row_signature(rows[0]) != row_signature(rows[1])
    with pytest.raises(ValueError, match=r"pixel_values of shapes \(1, 4\) and \(1, 5\).*batch size of 1"):
        join_rows(rows, pad_id=0, side="left")


def test_rows_of_any_length_have_one_signature_and_images_make_another() -> None:
    assert row_signature(row(1)) == row_signature(row(1, 2))
    assert row_signature(SHORT) != row_signature(LONG)


def test_segments_are_chained_and_what_text_lacks_is_filled_in() -> None:
    assert lists(chain_segments([LONG, row(1, 2), SHORT])) == {
        "input_ids": [[5, 6, 7, 1, 2, 8]],
        "attention_mask": [[1] * 6],
        "kinds": [[0, 1, 1, 0, 0, 0]],
        "labels": [[-100, 6, 7, -100, -100, 8]],
        "pixel_values": [[0.5, 0.5], [1.0, 1.0]],
    }
