"""The progress bar of a job in a terminal."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def open_bar(total: int, done: int, unit: str, *, name: str | None = None, smoothing: float = 0) -> tqdm[Any]:
    """Show how far a job is.

    Args:
        total: All there is to do.
        done: What was done before.
        unit: What is counted.
        name: In front of the bar.
        smoothing: Of the speed shown: 0 is the mean since the start, 1 that of the last moment.
    """
    # In a file or a job's log every refresh is a line of its own, so there are few of them.
    interval = 0.2 if sys.stderr.isatty() else 15
    return tqdm(
        total=total,
        initial=done,
        desc=name,
        unit=f" {unit}",
        mininterval=interval,
        dynamic_ncols=True,
        smoothing=smoothing,
    )


def write_above_bar(line: str) -> None:
    """Write a line that stays, above whatever bars there are."""
    tqdm.write(line, file=sys.stderr)
