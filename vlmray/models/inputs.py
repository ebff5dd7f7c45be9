"""Text and images to tensors, one row at a time, and rows to a batch: what engines and training share.

    prompt, images -> processor -> row -> join_rows -> batch

A row is what a processor returns for one prompt: token-wise tensors of shape (1, T) such as `input_ids`,
and tensors of its images. Rows meet only in the padding of `join_rows`, so that none depends on another.

Shapes: `B` rows, `T` tokens of the longest of them, `P` patches or images of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from PIL.Image import Image

IGNORED_LABEL = -100
"""The label of a token that the loss passes over, as torch's cross entropy has it."""


def encode_text(
    processor: Any, text: str, images: Sequence[Image], **options: Any
) -> dict[str, torch.Tensor]:
    """Turn formatted text with one placeholder an image into a row.

    Args:
        processor: As `vlmray.models.processors.load_processor` gives it.
        text: What the chat template wrote.
        images: RGB images, in the order of their placeholders.
        **options: Passed to the processor. Inference passes none, and so does the prompt in training.

    Returns:
        Token-wise tensors (1, T); the images' tensors (P, ...) if there are images.

    Raises:
        ValueError: Placeholders and images do not match. The processor may raise others.
    """
    row = dict(processor(text=[text], images=list(images) or None, return_tensors="pt", **options))
    check_placeholders(processor, row)
    return row


def check_placeholders(processor: Any, row: dict[str, torch.Tensor]) -> None:
    """Refuse a row whose text holds placeholders of its own: it would take a neighbour's image features.

    Raises:
        ValueError: More or fewer image tokens than the images give, or any video token.
    """
    ids = row["input_ids"]
    if "image_grid_thw" in row:
        expected = int(row["image_grid_thw"].prod(dim=-1).sum()) // processor.image_processor.merge_size**2
    else:
        expected = None if "pixel_values" in row else 0
    image_id, video_id = (getattr(processor, f"{kind}_token_id", None) for kind in ("image", "video"))
    found = int((ids == image_id).sum()) if image_id is not None else expected
    if expected is not None and found != expected:
        raise ValueError(f"the prompt has {found} image tokens where its images give {expected}")
    if video_id is not None and bool((ids == video_id).any()):
        raise ValueError("the prompt holds a video placeholder, and video is not supported")


def row_signature(row: dict[str, torch.Tensor]) -> tuple[Any, ...]:
    """Return the names and kinds of a row's tensors; rows of equal signatures can always be joined."""
    return tuple(
        (name, "tokens" if _is_token_wise(row, name) else tensor.shape[1:])
        for name, tensor in sorted(row.items())
    )


def join_rows(
    rows: Sequence[dict[str, torch.Tensor]], *, pad_id: int, side: Literal["left", "right"]
) -> dict[str, torch.Tensor]:
    """Join rows into a batch: token-wise tensors by padding, the others end to end.

    Args:
        rows: At least one. Rows with and without images can mix, and so can lengths.
        pad_id: Fills `input_ids`; labels are filled with -100, other token-wise tensors with 0.
        side: Where the padding goes: left for generation, right for training.

    Returns:
        Token-wise tensors (B, T), the others (P, ...).

    Raises:
        ValueError: Image tensors of shapes that cannot be laid end to end.
    """
    lengths = [row["input_ids"].shape[1] for row in rows]
    padding = [max(lengths) - length for length in lengths]
    joined = {}
    for name, token_wise, tensors in _by_name(rows):
        if token_wise:
            fill = pad_id if name == "input_ids" else _fill_of(name)
            tensors = [
                pad(tensor, (n, 0) if side == "left" else (0, n), value=fill)
                for tensor, n in zip(tensors, padding, strict=True)
            ]
        elif len({tensor.shape[1:] for tensor in tensors}) > 1:
            shapes = " and ".join(sorted({str(tuple(tensor.shape)) for tensor in tensors}))
            raise ValueError(
                f"rows with {name} of shapes {shapes} cannot share a batch; use a batch size of 1"
            )
        joined[name] = torch.cat(tensors)
    return joined


def chain_segments(segments: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Join the segments of one conversation, each encoded like a row, into the row of the whole.

    Args:
        segments: At least one. Where a segment lacks a token-wise tensor that others have, its labels
            are -100 and the rest 0: text has no labels unless given, and is no part of an image.

    Returns:
        Token-wise tensors (1, T), the others (P, ...).
    """
    return {
        name: torch.cat(tensors, dim=1 if token_wise else 0)
        for name, token_wise, tensors in _by_name(segments)
    }


def _by_name(rows: Sequence[dict[str, torch.Tensor]]) -> Iterator[tuple[str, bool, list[torch.Tensor]]]:
    """Yield each tensor name of any row, whether it is token-wise, and its tensors in row order."""
    for name in dict.fromkeys(name for row in rows for name in row):
        if any(_is_token_wise(row, name) for row in rows):
            empty = [torch.full_like(row["input_ids"], _fill_of(name)) for row in rows]
            yield name, True, [row.get(name, filled) for row, filled in zip(rows, empty, strict=True)]
        else:
            yield name, False, [row[name] for row in rows if name in row]


def _is_token_wise(row: dict[str, torch.Tensor], name: str) -> bool:
    return name in row and row[name].shape == row["input_ids"].shape


def _fill_of(name: str) -> int:
    return IGNORED_LABEL if name == "labels" else 0
