"""Which rows are asked for, and what they are called.

Rows have an index in their split that never changes; sample ids are made of it, and resuming relies on it.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vlmray.errors import OptionError

_SLICE = re.compile(
    r"""
    \s* (?P<open>\[)? \s*
    (?: (?P<index>-?\d{1,18})
      | (?P<start>-?\d{1,18})? \s* : \s* (?P<stop>-?\d{1,18})? \s* (?: : \s* (?P<step>-?\d{1,18})? )?
    )
    \s* (?(open)\]) \s*
    """,
    re.ASCII | re.VERBOSE,
)

_EXAMPLES = "examples: '[0:100]', '[:]', '[-5:]', '[::10]', '[7]', '[:10],[50:60]'"


def parse_sample_slices(text: str, num_rows: int) -> Sequence[int]:
    """Turn `--sample_slices` into row indices, in the order written, each once.

    Args:
        text: Python slices or indices, with or without brackets, separated by commas.
        num_rows: Rows of the split; negative indices count from its end.

    Raises:
        ValueError: a part is not a slice, an index is out of range, or nothing is selected.

    >>> parse_sample_slices("[0:3]", 10)
    range(0, 3)
    >>> list(parse_sample_slices("[-2:],[7:1:-3],5", 10))
    [8, 9, 7, 4, 5]
    """
    parts = [part for each in text.split(",") if len(part := _parse_part(each, text, num_rows))]
    if not parts:
        raise OptionError("sample_slices", f"{text!r} selects nothing", f"the split has {num_rows} rows")
    if len(parts) == 1:
        return parts[0]
    rows = np.concatenate([unpack_rows(part) for part in parts])
    _, firsts = np.unique(rows, return_index=True)
    return pack_rows(rows[np.sort(firsts)])


def _parse_part(part: str, text: str, num_rows: int) -> range:
    match = _SLICE.fullmatch(part)
    if match is None or (match["step"] and int(match["step"]) == 0):
        raise OptionError("sample_slices", f"{text!r} is not a list of Python slices", _EXAMPLES)
    if match["index"] is None:
        bounds = slice(*(int(bound) if bound else None for bound in match.group("start", "stop", "step")))
        return range(*bounds.indices(num_rows))
    index = int(match["index"])
    if not -num_rows <= index < num_rows:
        raise OptionError("sample_slices", f"{text!r}: no row {index}", f"the split has {num_rows} rows")
    return range(index % num_rows, index % num_rows + 1)


def pack_rows(rows: NDArray[np.int64]) -> Sequence[int]:
    """Return row indices as a sequence of 8 bytes each, or as a range where they are one."""
    steps = np.diff(rows)
    if len(steps) and (steps == steps[0]).all():  # each row once, so none is 0
        step = int(steps[0])
        return range(int(rows[0]), int(rows[-1]) + step, step)
    return array("q", rows.astype(np.int64).tobytes())


def unpack_rows(rows: Sequence[int]) -> NDArray[np.int64]:
    """Return row indices as an array."""
    if isinstance(rows, range):  # which numpy would make a list of
        return np.arange(rows.start, rows.stop, rows.step, dtype=np.int64)
    return np.asarray(rows, np.int64)


def mask_rows(rows: Sequence[int], num_rows: int) -> NDArray[np.bool_]:
    """Return which of all rows are among some."""
    mask = np.zeros(num_rows, np.bool_)
    mask[unpack_rows(rows)] = True
    return mask


def sample_id(split: str, index: int) -> str:
    """Name a row for good: `test-000042`."""
    return f"{split}-{index:06d}"


def row_indices(sample_ids: pa.Array) -> NDArray[np.int64]:
    """Return the rows that sample ids name; -1 for what is none.

    >>> row_indices(pa.array(["test-000042", "test-1234567", "other"])).tolist()
    [42, 1234567, -1]
    """
    digits = pc.struct_field(pc.extract_regex(sample_ids, r"-(?P<row>\d+)$"), "row")
    found: NDArray[np.int64] = pc.fill_null(pc.cast(digits, pa.int64()), -1).to_numpy(zero_copy_only=False)
    return found
