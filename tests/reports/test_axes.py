"""Axes hold every value, tick at round numbers, and label ticks so that they can be told apart."""

from __future__ import annotations

import math
import random

import pytest

from vlmray.reports.axes import Unit, format_value, is_drawable, x_axis, y_axis


def labels(values: list[float]) -> list[str]:
    return [label for _, label in x_axis(values).ticks]


def random_ranges() -> list[list[float]]:
    """Ranges of all sizes, about zero or far from it, a few of them a single value."""
    rng = random.Random(0)
    ranges = []
    for _ in range(400):
        middle = rng.choice([0.0, rng.uniform(-1, 1) * 10 ** rng.uniform(-12, 12)])
        ranges.append([middle, middle + rng.choice([0.0, 10 ** rng.uniform(-12, 12)])])
    return [*ranges, [0.0, 0.0], [1e99, -1e99], [1e-320, 0.0], [1e16, 1e16 + 2]]


@pytest.mark.parametrize("unit", ["number", "percent"])
def test_y_axis_holds_all_values_between_two_ticks(unit: Unit) -> None:
    for values in random_ranges():
        axis = y_axis(values, unit)
        ticks = [tick for tick, _ in axis.ticks]
        assert (axis.low, axis.high) == (ticks[0], ticks[-1])
        assert 2 <= len(ticks) <= 8
        assert len({label for _, label in axis.ticks}) == len(ticks), axis
        assert all(-1e-6 <= axis.share(value) <= 1 + 1e-6 for value in values)


def test_x_axis_spans_just_the_values() -> None:
    for values in random_ranges():
        axis = x_axis(values)
        assert len(axis.ticks) <= 8
        assert all(-1e-6 <= axis.share(tick) <= 1 + 1e-6 for tick, _ in axis.ticks)
        assert all(-1e-6 <= axis.share(value) <= 1 + 1e-6 for value in values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 100], ["0", "20", "40", "60", "80", "100"]),
        ([1, 3000], ["500", "1,000", "1,500", "2,000", "2,500", "3,000"]),
        ([0, 3], ["0", "1", "2", "3"]),
        ([5], ["5"]),
        ([0.1, 0.3], ["0.10", "0.15", "0.20", "0.25", "0.30"]),
        ([0, 2e-4], ["0", "5e−5", "1e−4", "1.5e−4", "2e−4"]),
        ([-1, 2e7], ["0", "5e6", "1e7", "1.5e7", "2e7"]),
    ],
)
def test_ticks_are_round(values: list[float], expected: list[str]) -> None:
    assert labels(values) == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1250.0, "1,250"),
        (-3, "−3"),
        (0.41234, "0.4123"),
        (12345.6, "12,346"),
        (0.00015, "1.5e−4"),
        (1.5e12, "1.5e12"),
        (math.nan, "NaN"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
    ],
)
def test_values_as_text(value: float, text: str) -> None:
    assert format_value(value) == text


def test_shares_as_text() -> None:
    assert [format_value(share, "percent") for share in (0.715, -0.02)] == ["71.5 %", "−2.0 %"]


def test_drawable() -> None:
    assert all(map(is_drawable, (0.0, -1e99, 1e99)))
    assert not any(map(is_drawable, (1e101, math.inf, -math.inf, math.nan)))
