"""One self-contained HTML page from tables, plots, galleries and facts; measures nothing.

    Table, Plot, LanePlot, Gallery, Fact -> Page -> render_page -> HTML text

What a report says is up to its own module; see `vlmray.inference.report` for that of an inference run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vlmray.reports.gallery import VERDICT_LABELS, Gallery, thumbnails
from vlmray.reports.lanes import LanePlot, draw_lanes
from vlmray.reports.plots import PATH_SIZE, Drawing, Plot, draw, list_values
from vlmray.reports.tables import Column, Mark, Table
from vlmray.reports.text import clean_text, excerpt


@dataclass(frozen=True, slots=True)
class Fact:
    """A number with its name, for the line of facts below the headline."""

    label: str
    value: str
    note: str = ""


Section = Table | Plot | LanePlot | Gallery


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What `render_page` lays out, top to bottom."""

    title: str
    headline: Fact
    """The one number to take away."""

    facts: tuple[Fact, ...] = ()
    links: tuple[tuple[str, str], ...] = ()
    """Texts and addresses of reports that lie beside this one."""

    sections: tuple[Section, ...] = ()
    """Plots that follow each other stand side by side where there is room."""


# ---------------------------------------------------------------------------------------------
# HTML
# ---------------------------------------------------------------------------------------------


def render_page(page: Page) -> str:
    """Lay a page out as one HTML text: no network, no scripts but its own, texts escaped."""
    return _environment().get_template("report.html.j2").render(page=page).lstrip()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,  # predictions are whatever a model wrote
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(clean=clean_text, excerpt=excerpt, sha256=_sha256, thumbnails=thumbnails)
    environment.filters.update(draw=_draw, value_table=_value_table, group_plots=_group_plots)
    environment.tests.update(
        gallery=lambda section: isinstance(section, Gallery),
        lanes=lambda section: isinstance(section, LanePlot),
        plot=lambda section: isinstance(section, Plot | LanePlot),
        mark=lambda cell: isinstance(cell, Mark),
    )
    environment.globals.update(verdict_labels=VERDICT_LABELS, path_size=PATH_SIZE)
    return environment


def _finalize(value: Any) -> Any:
    """Clean every text the template puts out, but not what it has built itself."""
    return clean_text(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _sha256(text: str) -> str:
    """Hash an inline script or style as its Content-Security-Policy wants it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _draw(plot: Plot | LanePlot) -> Drawing | None:
    return draw_lanes(plot) if isinstance(plot, LanePlot) else draw(plot)


def _value_table(plot: Plot) -> Table:
    """List the values of a plot, for those who want to read them off."""
    return Table(
        title=f"{plot.title}: values",
        columns=(Column(plot.x_label), *(Column(series.name, numeric=True) for series in plot.series)),
        rows=tuple(map(tuple, list_values(plot))),
    )


def _group_plots(sections: Iterable[Section]) -> list[tuple[bool, list[Section]]]:
    """Group open plots that follow each other: (True, plots) or (False, other sections)."""
    groups = groupby(
        sections, key=lambda section: isinstance(section, Plot | LanePlot) and not section.collapsed
    )
    return [(are_plots, list(group)) for are_plots, group in groups]
