"""Two runs over the same rows side by side.

    result rows before, result rows after -> compare -> Comparison

Rows are those that inference writes. A failed row counts as wrong in both columns: a run does not get
better by failing where it would have been wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vlmray.reports.errors import NO_FAMILY
from vlmray.reports.gallery import Row
from vlmray.reports.text import read_number


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """One family of questions, before and after."""

    name: str
    num_rows: int
    before: float
    """Mean score, 0 to 1."""

    after: float
    num_gained: int
    """Rows that scored higher after than before."""

    num_lost: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two runs in numbers."""

    before: str
    """What the first run is called."""

    after: str
    metric: str
    families: tuple[Gain, ...]
    total: Gain

    def of(self, family: str) -> Gain:
        """Return the numbers of one family."""
        return next(gain for gain in self.families if gain.name == family)


def compare(
    before: Sequence[Row], after: Sequence[Row], *, names: tuple[str, str], metric: str
) -> Comparison:
    """Set the scores of two runs against each other, row by row.

    Args:
        before: Result rows of one run.
        after: Result rows of the other, over the same samples in any order.
        names: What the runs are called.
        metric: Name of the metric behind `score`.

    Raises:
        ValueError: the runs are not about the same samples, or there are none.
    """
    later = {row["sample_id"]: row for row in after}
    if not before or later.keys() != {row["sample_id"] for row in before}:
        raise ValueError(
            f"{names[0]} and {names[1]} did not answer the same rows; compare the same selection"
        )
    pairs: dict[str, list[tuple[float, float]]] = {}
    for row in before:
        scores = (_score(row), _score(later[row["sample_id"]]))
        pairs.setdefault(row.get("family") or NO_FAMILY, []).append(scores)
    return Comparison(
        before=names[0],
        after=names[1],
        metric=metric,
        families=tuple(_gain(name, pairs[name]) for name in sorted(pairs)),
        total=_gain("all", [pair for found in pairs.values() for pair in found]),
    )


def _score(row: Row) -> float:
    return 0.0 if row.get("error") is not None else read_number(row.get("score")) or 0.0


def _gain(name: str, pairs: Sequence[tuple[float, float]]) -> Gain:
    return Gain(
        name=name,
        num_rows=len(pairs),
        before=math.fsum(one for one, _ in pairs) / len(pairs),
        after=math.fsum(other for _, other in pairs) / len(pairs),
        num_gained=sum(other > one for one, other in pairs),
        num_lost=sum(other < one for one, other in pairs),
    )


def choose_changed(before: Iterable[Row], after: Iterable[Row], focus: str, limit: int = 60) -> list[Row]:
    """Choose rows of the second run to show: where the score changed first, half of them of one family."""
    earlier = {row["sample_id"]: row for row in before}

    def order(row: Row) -> tuple[bool, str]:
        return _score(row) == _score(earlier[row["sample_id"]]), row["sample_id"]

    rows = sorted(after, key=order)
    chosen = [row for row in rows if row.get("family") == focus][: limit // 2]
    return chosen + [row for row in rows if row.get("family") != focus][: limit - len(chosen)]
