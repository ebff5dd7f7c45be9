"""A bar stands where its lane was at work, as high as it was, in a picture of bounded size."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import pytest

from vlmray.reports.lanes import Lane, LanePlot, draw_lanes
from vlmray.reports.plots import Drawing


def make_plot(*levels: Sequence[float], elapsed_s: float = 8.0) -> LanePlot:
    lanes = tuple(
        Lane(name=f"l{number}", levels=each, color=number % 2) for number, each in enumerate(levels)
    )
    return LanePlot(title="T", elapsed_s=elapsed_s, lanes=lanes)


def drawn(plot: LanePlot) -> Drawing:
    drawing = draw_lanes(plot)
    assert drawing is not None
    return drawing


def bars(path: str) -> list[tuple[float, ...]]:
    """Read left, bottom, top and right of bars, in units of the path's square."""
    return [tuple(map(float, bar)) for bar in re.findall(r"M(\S+) (\S+)V(\S+)H([^V]+)V\2Z", path)]


def test_bars_stand_in_their_lane_where_it_was_at_work() -> None:
    drawing = drawn(make_plot([0, 1, 1, 0.5], [1, 0, 0, 0]))
    tracks, curves = drawing.curves[::2], drawing.curves[1::2]
    assert [tick.label for tick in drawing.y_ticks] == ["l0", "l1"]
    assert [tick.at for tick in drawing.y_ticks] == [25, 75]
    assert bars(curves[0].bars) == [(250, 440, 60, 750), (750, 440, 250, 1000)]
    assert bars(curves[1].bars) == [(0, 940, 560, 250)]
    assert [bars(track.bars) for track in tracks] == [[(0, 440, 60, 1000)], [(0, 940, 560, 1000)]]
    assert [curve.color for curve in drawing.curves] == [0, 0, 1, 1]


def test_a_description_says_what_is_drawn() -> None:
    assert drawn(make_plot([0, 1, 1, 0], [0, 0, 0, 0])).description == (
        "l0: at work 50.0 % of the time, between 2 and 6 s. l1: not at work."
    )


@pytest.mark.parametrize(
    ("elapsed_s", "label", "last"),
    [(0.2, "s", "0.20"), (90, "s", "80"), (600, "min", "10"), (36_000, "h", "10")],
)
def test_the_time_axis_has_a_unit_that_fits(elapsed_s: float, label: str, last: str) -> None:
    plot = make_plot([1.0], elapsed_s=elapsed_s)
    ticks = drawn(plot).x_ticks
    assert plot.x_label.split()[0] == label
    assert (ticks[0].label.strip("0."), ticks[-1].label) == ("", last)
    assert len(ticks) <= 7


def test_without_time_there_is_nothing_to_draw() -> None:
    assert draw_lanes(make_plot()) is None
    assert draw_lanes(make_plot([0.0], elapsed_s=0.0)) is None


def test_the_worst_lane_is_small() -> None:
    rng = random.Random(0)
    drawing = drawn(make_plot([rng.random() for _ in range(300)]))
    assert sum(len(curve.bars) for curve in drawing.curves) < 10_000
