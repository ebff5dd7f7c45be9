"""Line plots as positions and texts; knows neither HTML nor what the numbers mean.

    Series -> Plot -> draw -> Drawing, which `templates/plot.html.j2` writes as SVG

Positions are percentages of the plot area, so one drawing fits every screen while its texts and strokes
keep their size. Only lines and bars are paths, in a square of `PATH_SIZE` units that is stretched over the
plot area.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

from vlmray.reports.axes import Axis, Unit, format_value, is_drawable, x_axis, y_axis

Style = Literal["line", "dots", "faint"]
"""A line; a line with a dot for each value; a thin pale line, for raw values before their smoothed line."""

MAX_POINTS = 400
"""Points drawn of one series: about as many as there are pixels to tell them apart."""

MAX_DOTS = 24
"""A line with more values than this gets no dots: they would run into each other."""

MAX_LISTED = 40
"""Values of one series in the table below a plot."""

NUM_COLORS = 5
PATH_SIZE = 1000

_CROWDED = 24
"""Characters of tick labels that fit side by side below the narrowest plot."""


# ---------------------------------------------------------------------------------------------
# What to plot
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line of a plot."""

    name: str
    points: tuple[tuple[float, float], ...]
    """(x, y), in any order; where y is not finite, the line has a gap."""

    style: Style = "line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """Series over one x axis, as a section of a page."""

    title: str
    x_label: str
    y_label: str
    """Empty where the names of the series say it."""

    series: tuple[Series, ...]
    note: str = ""
    y_unit: Unit = "number"
    y_include: tuple[float, ...] = ()
    """Values that the y axis reaches in any case: `(0.0,)` starts it at zero."""

    collapsed: bool = False
    """Fold the plot away behind its title on the page."""


# ---------------------------------------------------------------------------------------------
# What is drawn
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tick:
    """A labelled position on an axis, in percent from the left or from the top."""

    at: float
    label: str
    is_spare: bool = False
    """The label can be left out where the plot is narrow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A value, in percent from the left and from the top."""

    x: float
    y: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One series as drawn."""

    name: str
    style: Style
    color: int
    """Number of the colour, which also sets the dash of the line and the shape of the dots."""

    line: str
    """SVG path data; empty without points."""

    specks: str
    """SVG path data of values between two gaps, as lines of no length: their round caps show."""

    dots: tuple[Dot, ...]
    bars: str = ""
    """SVG path data of what is filled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A plot in positions and texts, ready for a template."""

    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    curves: tuple[Curve, ...]
    """In drawing order: faint ones lie below the others."""

    description: str
    """What the plot shows, for those who do not see it."""

    remarks: tuple[str, ...]
    """What could not be drawn."""

    @property
    def widest_label(self) -> str:
        """Return the y tick label that needs most space."""
        return max((tick.label for tick in self.y_ticks), key=len, default="")


class _Point(NamedTuple):
    x: float
    y: float


def draw(plot: Plot) -> Drawing | None:
    """Lay a plot out; None where none of its values can be drawn."""
    placed = [_place(series) for series in plot.series]
    heights = [point.y for points in placed for point in points if is_drawable(point.y)]
    if not heights:
        return None
    across = x_axis([point.x for points in placed for point in points])
    up = y_axis([*heights, *plot.y_include], plot.y_unit)
    curves = [
        _draw_series(plot, series, color, _thin(points), across, up)
        for series, color, points in zip(plot.series, _colors(plot.series), placed, strict=True)
    ]
    return Drawing(
        x_ticks=x_ticks(across),
        y_ticks=tuple(Tick(round(100 - tick.at, 2), tick.label) for tick in _ticks(up)),
        curves=tuple(sorted(curves, key=lambda curve: curve.style != "faint")),
        description=" ".join(map(_describe, [plot] * len(placed), plot.series, placed)),
        remarks=_remarks(plot),
    )


def list_values(plot: Plot) -> list[list[str]]:
    """List x and the value of each series there, at most `MAX_LISTED` values of each, evenly picked."""
    placed = [_place(series) for series in plot.series]
    listed = sorted({point.x for points in placed for point in _pick(points, MAX_LISTED)})
    by_x = [{point.x: point for point in points} for points in placed]
    return [
        [format_value(x), *(format_value(points[x].y, plot.y_unit) if x in points else "" for points in by_x)]
        for x in listed
    ]


# ---------------------------------------------------------------------------------------------
# Points
# ---------------------------------------------------------------------------------------------


def _place(series: Series) -> list[_Point]:
    """Sort the points that have a place on the x axis."""
    points = (_Point(x, y) for x, y in series.points if is_drawable(x))
    return sorted(points, key=lambda point: point.x)


def _thin(points: Sequence[_Point]) -> Sequence[_Point]:
    """Keep the ends, and of each stretch its lowest value, its highest and a gap, if it has one."""
    if len(points) <= MAX_POINTS:
        return points
    num_stretches = (MAX_POINTS - 2) // 3
    kept = {0, len(points) - 1}
    for index in range(num_stretches):
        start, stop = (len(points) * edge // num_stretches for edge in (index, index + 1))
        valued = [place for place in range(start, stop) if is_drawable(points[place].y)]
        gaps = [place for place in range(start, stop) if not is_drawable(points[place].y)]
        kept.update(gaps[:1])
        if valued:
            kept.add(min(valued, key=lambda place: points[place].y))
            kept.add(max(valued, key=lambda place: points[place].y))
    return [points[place] for place in sorted(kept)]


def _pick(points: Sequence[_Point], limit: int) -> list[_Point]:
    """Pick points evenly, both ends among them."""
    if len(points) <= limit:
        return list(points)
    return [points[round(index * (len(points) - 1) / (limit - 1))] for index in range(limit)]


# ---------------------------------------------------------------------------------------------
# Ticks and curves
# ---------------------------------------------------------------------------------------------


def _ticks(axis: Axis) -> tuple[Tick, ...]:
    """Place ticks in percent from the low end."""
    return tuple(Tick(round(100 * axis.share(value), 2), label) for value, label in axis.ticks)


def x_ticks(axis: Axis) -> tuple[Tick, ...]:
    """Place the ticks of an x axis; every second label is spare where all of them together are long."""
    ticks = _ticks(axis)
    if sum(len(tick.label) for tick in ticks) <= _CROWDED:
        return ticks
    return tuple(Tick(tick.at, tick.label, is_spare=index % 2 == 1) for index, tick in enumerate(ticks))


def _colors(series: Sequence[Series]) -> list[int]:
    """Number the colours; a faint series has that of the next one, which smooths it."""
    num_before = (sum(other.style != "faint" for other in series[:index]) for index in range(len(series)))
    return [number % NUM_COLORS for number in num_before]


def _draw_series(
    plot: Plot, series: Series, color: int, points: Sequence[_Point], across: Axis, up: Axis
) -> Curve:
    runs = [list(run) for drawn, run in groupby(points, key=lambda point: is_drawable(point.y)) if drawn]
    valued = [point for run in runs for point in run]
    # A line needs two values; one alone would not be seen.
    has_dots = len(valued) == 1 or (series.style == "dots" and len(valued) <= MAX_DOTS)
    return Curve(
        name=series.name,
        style="dots" if has_dots else "line" if series.style == "dots" else series.style,
        color=color,
        line="".join(_path(run, across, up) for run in runs if len(run) > 1),
        specks="".join(_path(run * 2, across, up) for run in runs if len(run) == 1),
        dots=tuple(_dot(plot, series, point, across, up) for point in valued) if has_dots else (),
    )


def _path(run: Iterable[_Point], across: Axis, up: Axis) -> str:
    """Return path data through points."""
    return "M" + "L".join(
        f"{PATH_SIZE * across.share(x):.1f} {PATH_SIZE * (1 - up.share(y)):.1f}" for x, y in run
    )


def _dot(plot: Plot, series: Series, point: _Point, across: Axis, up: Axis) -> Dot:
    return Dot(
        x=round(100 * across.share(point.x), 2),
        y=round(100 * (1 - up.share(point.y)), 2),
        text=f"{series.name}: {_point_text(plot, point)}",
    )


# ---------------------------------------------------------------------------------------------
# Texts
# ---------------------------------------------------------------------------------------------


def _point_text(plot: Plot, point: _Point) -> str:
    return f"{format_value(point.y, plot.y_unit)} at {plot.x_label} {format_value(point.x)}"


def _describe(plot: Plot, series: Series, points: Sequence[_Point]) -> str:
    """Say where a series starts, ends, and has its extremes."""
    valued = [point for point in points if is_drawable(point.y)]
    if not valued:
        return f"{series.name}: no values."
    if len(valued) == 1:
        return f"{series.name}: {_point_text(plot, valued[0])}."
    lowest = min(valued, key=lambda point: point.y)
    highest = max(valued, key=lambda point: point.y)
    first, last, low, high = (_point_text(plot, point) for point in (valued[0], valued[-1], lowest, highest))
    return f"{series.name}, {len(valued):,} values: from {first} to {last}; lowest {low}, highest {high}."


def _remarks(plot: Plot) -> tuple[str, ...]:
    """Say how many values are missing from the drawing, so that a gap does not pass for a smooth line."""
    names: dict[str, list[str]] = {}
    for series in plot.series:
        num_missing = sum(not (is_drawable(x) and is_drawable(y)) for x, y in series.points)
        if num_missing:
            remark = f"{num_missing:,} of {len(series.points):,} values are not drawn (not finite)."
            names.setdefault(remark, []).append(series.name)
    return tuple(f"{' and '.join(who)}: {remark}" for remark, who in names.items())
