"""Which rows are asked for, and what they are called.

Rows have an index in their split that never changes; sample ids are made of it, and resuming relies on it.
"""

from __future__ import annotations

import re

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


def parse_sample_slices(text: str, num_rows: int) -> list[int]:
    """Turn `--sample_slices` into row indices, in the order written, each once.

    Args:
        text: Python slices or indices, with or without brackets, separated by commas.
        num_rows: Rows of the split; negative indices count from its end.

    Raises:
        ValueError: a part is not a slice, an index is out of range, or nothing is selected.

    >>> parse_sample_slices("[0:3]", 10)
    [0, 1, 2]
    >>> parse_sample_slices("[-2:],[7:1:-3],5", 10)
    [8, 9, 7, 4, 5]
    """
    selected: dict[int, None] = {}
    for part in text.split(","):
        match = _SLICE.fullmatch(part)
        if match is None or (match["step"] and int(match["step"]) == 0):
            raise OptionError("sample_slices", f"{text!r} is not a list of Python slices", _EXAMPLES)
        if match["index"]:
            index = int(match["index"])
            if not -num_rows <= index < num_rows:
                raise OptionError(
                    "sample_slices", f"{text!r}: no row {index}", f"the split has {num_rows} rows"
                )
            selected[index % num_rows] = None
        else:
            bounds = slice(*(int(bound) if bound else None for bound in match.group("start", "stop", "step")))
            selected.update(dict.fromkeys(range(*bounds.indices(num_rows))))
    if not selected:
        raise OptionError("sample_slices", f"{text!r} selects nothing", f"the split has {num_rows} rows")
    return list(selected)


def sample_id(split: str, index: int) -> str:
    """Name a row for good: `test-000042`."""
    return f"{split}-{index:06d}"
