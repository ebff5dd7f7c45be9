"""The demo's comparison as a table and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmray.demo.comparison import Comparison
from vlmray.reports.errors import option_table
from vlmray.reports.gallery import Gallery, GalleryItem
from vlmray.reports.page import Fact, Page, Section, render_page
from vlmray.reports.tables import Cell, Column, Table
from vlmray.reports.text import format_percent, format_points, shorten


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
