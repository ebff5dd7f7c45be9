"""Lanes over a common time as positions and texts: what was at work when; knows neither HTML nor stages.

Lane -> LanePlot -> draw_lanes -> Drawing, which `templates/plot.html.j2` writes as SVG
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean

from vlmray.reports.axes import format_value, x_axis
from vlmray.reports.plots import PATH_SIZE, Curve, Drawing, Style, Tick, x_ticks

_BAR = 0.76
"""Height of a bar, as a share of its lane."""

_UNITS = ((3600.0, "h"), (60.0, "min"), (1.0, "s"))
_LEAST_UNITS = 3  # a scale of fewer would have odd ticks


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One row of a plot of lanes."""

    name: str
    levels: Sequence[float]
    """How much of each stretch of the time it was at work, 0 to 1; the stretches are equally long."""

    color: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LanePlot:
    """Lanes one below the other, as a section of a page."""

    title: str
    elapsed_s: float
    """Where the time axis ends; it begins at 0."""

    lanes: tuple[Lane, ...]
    lead: str = ""
    """What to take away from it, above the lanes."""

    note: str = ""
    collapsed: bool = False
    """Fold the plot away behind its title on the page."""

    y_label: str = ""

    @property
    def x_label(self) -> str:
        """Name the time axis, which begins with the first lane."""
        return f"{self.unit[1]} since the first task began"

    @property
    def unit(self) -> tuple[float, str]:
        """Return the unit of the time axis, in seconds, and its name."""
        return next((unit for unit in _UNITS if self.elapsed_s >= _LEAST_UNITS * unit[0]), _UNITS[-1])


def draw_lanes(plot: LanePlot) -> Drawing | None:
    """Lay lanes out, each bar as high as the share of its time; None where there is no time to show."""
    if not plot.lanes or plot.elapsed_s <= 0:
        return None
    height = 1 / len(plot.lanes)
    curves = []
    for index, lane in enumerate(plot.lanes):
        top, bottom = ((index + 0.5 + half) * height for half in (-_BAR / 2, _BAR / 2))
        curves.append(_bars("faint", lane, [1.0], top, bottom))  # shows where it was not at work
        curves.append(_bars("line", lane, lane.levels, top, bottom))
    return Drawing(
        x_ticks=x_ticks(x_axis([0.0, plot.elapsed_s / plot.unit[0]])),
        y_ticks=tuple(
            Tick(round(100 * (index + 0.5) * height, 2), lane.name) for index, lane in enumerate(plot.lanes)
        ),
        curves=tuple(curves),
        description=" ".join(_describe(plot, lane) for lane in plot.lanes),
        remarks=(),
    )


def _bars(style: Style, lane: Lane, levels: Sequence[float], top: float, bottom: float) -> Curve:
    """Return bars that stand on the bottom of a lane, those that touch as one shape."""
    width = PATH_SIZE / len(levels)
    data, place = "", 0
    for level, run in groupby(round(level, 2) for level in levels):
        begin, place = place, place + len(list(run))
        if level > 0:
            x, x_end = f"{begin * width:.1f}", f"{place * width:.1f}"
            y, base = f"{PATH_SIZE * (bottom - level * (bottom - top)):.1f}", f"{PATH_SIZE * bottom:.1f}"
            data += f"M{x} {base}V{y}H{x_end}V{base}Z"
    return Curve(name=lane.name, style=style, color=lane.color, line="", specks="", dots=(), bars=data)


def _describe(plot: LanePlot, lane: Lane) -> str:
    """Say for how much of the time a lane was at work, and between when and when."""
    busy = [index for index, level in enumerate(lane.levels) if level > 0]
    if not busy:
        return f"{lane.name}: not at work."
    seconds, unit = plot.unit
    begin, end = (
        format_value(round(plot.elapsed_s * index / len(lane.levels) / seconds, 2))
        for index in (busy[0], busy[-1] + 1)
    )
    share = format_value(fmean(lane.levels), "percent")
    return f"{lane.name}: at work {share} of the time, between {begin} and {end} {unit}."
