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

from vlmray.models.families.base import Fill, Layout

if TYPE_CHECKING:
    from PIL.Image import Image

_PLAIN = Layout()

IGNORED_LABEL = -100
"""The label of a token that the loss passes over, as torch's cross entropy has it."""


def encode_text(
    processor: Any, text: str, images: Sequence[Image] = (), *, continues: bool = False
) -> dict[str, torch.Tensor]:
    """Turn formatted text with one placeholder an image into a row, as `apply_chat_template` would.

    Args:
        processor: As `vlmray.models.processors.load_processor` gives it.
        text: What the chat template wrote.
        images: RGB images, in the order of their placeholders.
        continues: It stands behind other text, so nothing is put before it.

    Returns:
        Token-wise tensors (1, T); the images' tensors (P, ...) if there are images.

    Raises:
        ValueError: Placeholders and images do not match. The processor may raise others.
    """
    nested = [list(images)] if images else None  # of one sample: some cut images of several up otherwise
    options = special_token_options(processor.tokenizer, text, continues=continues)
    row = dict(processor(text=[text], images=nested, return_tensors="pt", **options))
    row.pop("labels", None)  # PaliGemma's, of a suffix that it was not given
    check_placeholders(processor, row)
    return row


def special_token_options(tokenizer: Any, text: str, *, continues: bool = False) -> dict[str, Any]:
    """Return how a tokenizer is kept from a second token that starts the sequence."""
    start = getattr(tokenizer, "bos_token", None)
    is_started = continues or (start is not None and text.startswith(start))
    return {"add_special_tokens": False} if is_started else {}


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


def row_signature(row: dict[str, torch.Tensor], layout: Layout = _PLAIN) -> tuple[Any, ...]:
    """Return the names and kinds of a row's tensors; those of one signature can share a pass."""
    kinds = []
    for name, tensor in sorted(row.items()):
        token_wise = _is_token_wise(row, name, layout)
        kinds.append((name, token_wise, _fixed_axes(name, tensor, layout, token_wise)))
    return tuple(kinds)


def join_rows(
    rows: Sequence[dict[str, torch.Tensor]],
    *,
    pad_id: int,
    side: Literal["left", "right"],
    layout: Layout = _PLAIN,
) -> dict[str, torch.Tensor]:
    """Join rows into a batch: token-wise tensors by padding, the others end to end.

    Args:
        rows: At least one. Rows with and without images can mix, and so can lengths.
        pad_id: Fills `input_ids`; labels are filled with -100, other tensors with 0.
        side: Where the padding of tokens goes: left for generation, right for training.
        layout: Of the family.

    Returns:
        Token-wise tensors (B, T, ...), the others (P, ...).

    Raises:
        ValueError: Image tensors of shapes that cannot be laid end to end.
    """
    length = max(row["input_ids"].shape[1] for row in rows)
    joined = {}
    for name, token_wise, tensors in _by_name(rows, layout):
        tensors = _pad_ragged(tensors, layout.ragged.get(name, ()))
        if token_wise:
            fill = pad_id if name == "input_ids" else _fill_of(name)
            tensors = [_pad_axis(tensor, 1, length, fill, at_start=side == "left") for tensor in tensors]
        elif len({tensor.shape[1:] for tensor in tensors}) > 1:
            shapes = " and ".join(sorted({str(tuple(tensor.shape)) for tensor in tensors}))
            raise ValueError(
                f"rows with {name} of shapes {shapes} cannot share a batch; use a batch size of 1"
            )
        joined[name] = torch.cat(tensors)
    return joined


def chain_segments(
    segments: Sequence[dict[str, torch.Tensor]], layout: Layout = _PLAIN
) -> dict[str, torch.Tensor]:
    """Join the segments of one conversation, each encoded like a row, into the row of the whole.

    Args:
        segments: At least one. Where a segment lacks a token-wise tensor that others have, its labels
            are -100 and the rest what the layout says: text has no labels unless given, and is no part of
            an image.
        layout: Of the family.

    Returns:
        Token-wise tensors (1, T, ...), the others (P, ...).
    """
    return {
        name: torch.cat(tensors, dim=1 if token_wise else 0)
        for name, token_wise, tensors in _by_name(segments, layout, chained=True)
    }


def _by_name(
    rows: Sequence[dict[str, torch.Tensor]], layout: Layout, *, chained: bool = False
) -> Iterator[tuple[str, bool, list[torch.Tensor]]]:
    """Yield each tensor name of any row, whether it is token-wise, and its tensors in row order."""
    for name in dict.fromkeys(name for row in rows for name in row):
        given = [row[name] for row in rows if name in row]
        if any(_is_token_wise(row, name, layout) for row in rows):
            yield name, True, _with_text(rows, name, layout.fills.get(name) if chained else None)
        elif name in layout.whole_rows and not chained:
            yield name, False, [row.get(name, torch.zeros_like(given[0])) for row in rows]
        else:
            yield name, False, given


def _with_text(rows: Sequence[dict[str, torch.Tensor]], name: str, fill: Fill | None) -> list[torch.Tensor]:
    """Return a token-wise tensor of all rows, made up for those that are text alone."""
    first = next(row[name] for row in rows if name in row)
    tensors: list[torch.Tensor] = []
    for row in rows:
        shape = (*row["input_ids"].shape, *first.shape[2:])
        if name in row:
            tensors.append(row[name])
        elif fill == "last" and tensors:
            tensors.append(tensors[-1][:, -1:].expand(shape))
        else:
            tensors.append(
                first.new_full(shape, fill if isinstance(fill, int) and tensors else _fill_of(name))
            )
    return tensors


def _pad_ragged(tensors: list[torch.Tensor], axes: Sequence[int]) -> list[torch.Tensor]:
    for axis in axes:
        size = max(tensor.shape[axis] for tensor in tensors)
        tensors = [_pad_axis(tensor, axis, size, 0) for tensor in tensors]
    return tensors


def _pad_axis(
    tensor: torch.Tensor, axis: int, size: int, fill: int, *, at_start: bool = False
) -> torch.Tensor:
    missing = size - tensor.shape[axis]
    behind = [0, 0] * (tensor.dim() - 1 - axis)  # `pad` counts axes from the last
    return pad(tensor, (*behind, *((missing, 0) if at_start else (0, missing))), value=fill)


def _fixed_axes(name: str, tensor: torch.Tensor, layout: Layout, token_wise: bool) -> tuple[int, ...]:
    """Return the sizes that a tensor must have in common with those that it is joined with."""
    free = {0, *([1] if token_wise else []), *(layout.ragged.get(name, ()) if layout.pads_exactly else ())}
    return tuple(size for axis, size in enumerate(tensor.shape) if axis not in free)


def _is_token_wise(row: dict[str, torch.Tensor], name: str, layout: Layout) -> bool:
    return name in row and (name in layout.tokens or row[name].shape == row["input_ids"].shape)


def _fill_of(name: str) -> int:
    return IGNORED_LABEL if name == "labels" else 0
