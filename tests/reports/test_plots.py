"""A drawing keeps what the values show: their place, their extremes, their gaps."""

from __future__ import annotations

import math
import random
import re
from typing import Any

import pytest

from vlmray.reports import plots
from vlmray.reports.plots import Plot, Series, draw, list_values

Points = tuple[tuple[float, float], ...]


def make_plot(*points: Points, **values: Any) -> Plot:
    """Make a plot of one series for each tuple of points."""
    style = values.pop("style", "line")
    series = tuple(Series(name=f"s{index}", points=each, style=style) for index, each in enumerate(points))
    return Plot(**({"title": "T", "x_label": "step", "y_label": "loss", "series": series} | values))


def drawn(plot: Plot) -> plots.Drawing:
    drawing = draw(plot)
    assert drawing is not None
    return drawing


def corners(path: str) -> list[tuple[float, float]]:
    """Read the corners of path data, in units of the path's square."""
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](\S+) ([^MLZ]+)", path)]


def noise(num_points: int, seed: int = 0) -> Points:
    rng = random.Random(seed)
    return tuple((float(index), rng.gauss(0, 1)) for index in range(num_points))


def test_values_lie_where_the_axes_say() -> None:
    drawing = drawn(make_plot(((0, 0.0), (10, 1.0), (5, 0.5))))
    (curve,) = drawing.curves
    assert corners(curve.line) == [(0, 1000), (500, 500), (1000, 0)]
    assert [(tick.label, tick.at) for tick in drawing.y_ticks][:2] == [("0.0", 100), ("0.2", 80)]
    assert [(tick.label, tick.at) for tick in drawing.x_ticks][:2] == [("0", 0), ("2", 20)]


@pytest.mark.parametrize("num_points", [400, 401, 5_000, 50_000])
def test_many_points_are_thinned_and_keep_their_extremes(num_points: int) -> None:
    points = noise(num_points)
    plot = make_plot(points)
    kept = corners(drawn(plot).curves[0].line)
    assert len(kept) <= plots.MAX_POINTS
    assert (kept[0][0], kept[-1][0]) == (0, 1000)
    extremes = (min(points, key=lambda point: point[1]), max(points, key=lambda point: point[1]))
    heights = {y for _, y in corners(drawn(make_plot(extremes)).curves[0].line)}
    assert heights <= {y for _, y in kept}
    assert kept == sorted(kept, key=lambda corner: corner[0])


def test_thinning_keeps_gaps() -> None:
    points = tuple((x, math.nan if x == 3_000 else y) for x, y in noise(6_000))
    (curve,) = drawn(make_plot(points)).curves
    assert curve.line.count("M") == 2


def test_gaps_split_the_line_and_are_counted() -> None:
    values = (1.0, 2.0, math.nan, 3.0, math.inf, 4.0, 5.0)
    drawing = drawn(make_plot(tuple(enumerate(values)), ((0, 1.0), (6, 2.0))))
    assert drawing.curves[0].line.count("M") == 2
    assert corners(drawing.curves[0].specks)[0] == (500, 500)  # the 3 between two gaps, alone
    assert drawing.remarks == ("s0: 2 of 7 values are not drawn (not finite).",)


def test_points_without_a_place_are_left_out() -> None:
    plot = make_plot(((math.nan, 1.0), (math.inf, 1.0), (0, 9.0), (1, 1.0), (10, 2.0)))
    drawing = drawn(plot)
    assert len(corners(drawing.curves[0].line)) == 3
    assert drawing.remarks == ("s0: 2 of 5 values are not drawn (not finite).",)


@pytest.mark.parametrize("points", [(), ((1, math.nan),), ((math.inf, 1.0),), ((1, 1e200),)])
def test_nothing_to_draw(points: Points) -> None:
    assert draw(make_plot(points)) is None
    assert draw(make_plot()) is None
    assert list_values(make_plot()) == []
    drawing = drawn(make_plot(points, ((1, 1.0),)))
    assert "s0: no values." in drawing.description


@pytest.mark.parametrize(
    "points",
    [
        ((5, 2.0),),
        ((5, 0.0),),
        ((0, -1e-300),),
        ((5, 1.0), (5, 2.0)),
        tuple((x, 7.0) for x in range(9)),
        ((-1e99, 1e99), (1e99, -1e99)),
        ((1e15, 1.0), (1e15 + 1, 1.0)),
    ],
)
def test_degenerate_values_stay_inside(points: Points) -> None:
    drawing = drawn(make_plot(points, y_unit="percent"))
    inside = corners(drawing.curves[0].line) + [(10 * dot.x, 10 * dot.y) for dot in drawing.curves[0].dots]
    assert inside
    assert all(-0.01 <= place <= 1000.01 for corner in inside for place in corner)


def test_one_value_is_a_dot_whatever_the_style() -> None:
    (dot,) = drawn(make_plot(((5, 2.0),))).curves[0].dots
    assert (dot.x, dot.y, dot.text) == (50, 50, "s0: 2 at step 5")


def test_dots_give_way_where_they_would_touch() -> None:
    few, many = (drawn(make_plot(noise(number), style="dots")).curves[0] for number in (plots.MAX_DOTS, 100))
    assert (few.style, len(few.dots)) == ("dots", plots.MAX_DOTS)
    assert (many.style, many.dots) == ("line", ())


def test_the_axis_reaches_what_it_is_told_to() -> None:
    drawing = drawn(make_plot(((0, 0.4), (1, 0.5)), y_include=(0.0, 1.0), y_unit="percent"))
    assert (drawing.y_ticks[0].label, drawing.y_ticks[-1].label) == ("0 %", "100 %")
    assert drawing.widest_label == "100 %"


def test_a_faint_series_is_below_and_has_the_colour_of_the_next() -> None:
    series = [Series(name=name, points=((0, 1.0), (1, 2.0))) for name in ("a", "b", "c")]
    series[1] = Series(name="b", points=((0, 1.0), (1, 2.0)), style="faint")
    curves = drawn(Plot(title="T", x_label="x", y_label="y", series=tuple(series))).curves
    assert [(curve.name, curve.color) for curve in curves] == [("b", 1), ("a", 0), ("c", 1)]


def test_description_and_values_say_the_same_as_the_drawing() -> None:
    plot = make_plot(((0, 2.0), (1, 0.5), (2, 1.0)), ((1, 4.0),), y_unit="percent")
    assert drawn(plot).description == (
        "s0, 3 values: from 200.0 % at step 0 to 100.0 % at step 2;"
        " lowest 50.0 % at step 1, highest 200.0 % at step 0. s1: 400.0 % at step 1."
    )
    assert list_values(plot) == [["0", "200.0 %", ""], ["1", "50.0 %", "400.0 %"], ["2", "100.0 %", ""]]


def test_listed_values_are_bounded_and_keep_the_ends() -> None:
    rows = list_values(make_plot(noise(10_000), noise(10_000, seed=1)))
    assert len(rows) == plots.MAX_LISTED
    assert (rows[0][0], rows[-1][0]) == ("0", "9,999")


def test_long_labels_below_a_plot_can_be_left_out() -> None:
    long = drawn(make_plot(((0, 1.0), (12_000, 2.0)))).x_ticks
    assert [tick.is_spare for tick in long] == [False, True, False, True, False, True, False]
    assert not any(tick.is_spare for tick in drawn(make_plot(((0, 1.0), (100, 2.0)))).x_ticks)
