"""Two runs over the same rows side by side, as a table and an HTML page; measures nothing.

    result rows before, result rows after -> compare -> Comparison -> format_comparison
                                                                   -> render_comparison_html

Rows are those that inference writes. A failed row counts as wrong in both columns: a run does not get
better by failing where it would have been wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmray.inference.report import NO_FAMILY, option_table
from vlmray.reports.page import (
    Cell,
    Column,
    Fact,
    Gallery,
    GalleryItem,
    Page,
    Row,
    Section,
    Table,
    format_percent,
    format_points,
    read_number,
    render_page,
    shorten,
)


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


def format_comparison(comparison: Comparison) -> str:
    """Format the closing table: plain text, at most 80 columns wide."""
    return _gain_table(comparison, with_total=True).to_text()


def _gain_table(comparison: Comparison, *, with_total: bool = False) -> Table:
    rows = [*comparison.families, *([comparison.total] if with_total else [])]
    return Table(
        title=f"{comparison.metric} by family",
        columns=(
            Column("family"),
            Column("rows", True),
            Column(shorten(comparison.before, 16), True),
            Column(shorten(comparison.after, 16), True),
            Column("gain", True),
            Column("got right", True),
            Column("lost", True),
        ),
        rows=tuple(
            (
                gain.name,
                f"{gain.num_rows:,}",
                Cell(format_percent(gain.before), gain.before),
                Cell(format_percent(gain.after), gain.after),
                format_points(gain.after - gain.before),
                f"{gain.num_gained:,}",
                f"{gain.num_lost:,}",
            )
            for gain in rows
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonReport:
    """Two runs as the page shows them."""

    title: str
    comparison: Comparison
    focus: str
    """Family that the headline is about."""

    facts: tuple[Fact, ...] = ()
    plots: tuple[Section, ...] = ()
    gallery: tuple[GalleryItem, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def choose_changed(before: Iterable[Row], after: Iterable[Row], focus: str, limit: int = 60) -> list[Row]:
    """Choose rows of the second run to show: where the score changed first, half of them of one family."""
    earlier = {row["sample_id"]: row for row in before}

    def order(row: Row) -> tuple[bool, str]:
        return _score(row) == _score(earlier[row["sample_id"]]), row["sample_id"]

    rows = sorted(after, key=order)
    chosen = [row for row in rows if row.get("family") == focus][: limit // 2]
    return chosen + [row for row in rows if row.get("family") != focus][: limit - len(chosen)]


def render_comparison_html(report: ComparisonReport) -> str:
    """Render the comparison as one HTML page that needs nothing but itself."""
    comparison, focus = report.comparison, report.comparison.of(report.focus)
    sections: list[Section] = [_gain_table(comparison, with_total=True), *report.plots]
    if report.gallery:
        note = (
            f"{len(report.gallery):,} of {comparison.total.num_rows:,} rows, changed ones first: "
            "their mix is not the score."
        )
        sections.append(Gallery(title="Samples", items=report.gallery, note=note))
    if report.options:
        sections.append(option_table(report.options))
    label = (
        f"{comparison.metric} on {focus.name}, from {format_percent(focus.before)} "
        f"with {comparison.before}, over {focus.num_rows:,} held-out rows"
    )
    return render_page(
        Page(
            title=report.title,
            headline=Fact(label, format_percent(focus.after)),
            facts=report.facts,
            sections=tuple(sections),
        )
    )
