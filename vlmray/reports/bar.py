"""The progress bar of a job in a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from vlmray.reports.text import format_duration

AHEAD = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"
"""The line of a job that says itself what is left: the bar's own guess counts the loading of the model."""


def open_bar(total: int, done: int, unit: str, *, name: str | None = None, smoothing: float = 0,
    form: str | None = None,
) -> tqdm[Any]:  # fmt: skip
    """Show how far a job is.

    Args:
        total: All there is to do.
        done: What was done before.
        unit: What is counted.
        name: In front of the bar.
        smoothing: Of the speed shown: 0 is the mean since the start, 1 that of the last moment.
        form: Of the line, as tqdm has it.
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
        bar_format=form,
    )


@dataclass(slots=True)
class Forecast:
    """How long the rest of a job takes, and what all of it costs.

    It is told by how fast the job goes since the last of its workers had its first results: what came before
    was loading, which does not come again.
    """

    num_left: int
    price_per_hour: float | None = None
    """Of one worker."""

    clock: Callable[[], float] = time.time
    _begun_s: float | None = field(default=None, init=False)
    _first_s: float | None = field(default=None, init=False)
    _num_since: int = field(default=0, init=False)
    _num_workers: int = field(default=0, init=False)

    def add(self, num_done: int, num_workers: int, *, begun_s: float) -> None:
        """Count results.

        Args:
            num_done: How many there are more.
            num_workers: How many have had results by now.
            begun_s: When the work on them began, by the clock.
        """
        self.num_left -= num_done
        self._num_since += num_done
        if num_workers > self._num_workers:  # faster from now on
            self._num_workers, self._num_since, self._first_s = num_workers, 0, self.clock()
        if self._begun_s is None:
            self._begun_s = begun_s

    def left_s(self) -> float | None:
        """Return the seconds that the rest takes; None before there is anything to tell it by."""
        if self._first_s is None or not self._num_since:
            return None
        return self.num_left * (self.clock() - self._first_s) / self._num_since

    def cost(self) -> float | None:
        """Return what all of it costs with the workers that there are; None where that cannot be told."""
        left_s = self.left_s()
        if left_s is None or self.price_per_hour is None or self._begun_s is None:
            return None
        return self._num_workers * (self.clock() - self._begun_s + left_s) / 3600 * self.price_per_hour

    def words(self) -> dict[str, str]:
        """Return what the line of a job says of it."""
        left_s, cost = self.left_s(), self.cost()
        words = {} if left_s is None else {"left": format_duration(left_s)}
        return words if cost is None else {**words, "cost of all": f"{cost:,.3g}"}


def write_above_bar(line: str) -> None:
    """Write a line that stays, above whatever bars there are."""
    tqdm.write(line, file=sys.stderr)
