"""What a job's line says of what is left."""

from __future__ import annotations

import pytest

from vlmray.reports.bar import Forecast


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_nothing_is_said_before_there_is_anything_to_tell_it_by(clock: Clock) -> None:
    forecast = Forecast(100, 2.0, clock=clock)
    assert forecast.words() == {}
    forecast.add(10, 1, begun_s=400)
    assert forecast.words() == {}


def test_loading_does_not_come_again_but_is_paid(clock: Clock) -> None:
    forecast = Forecast(100, 2.0, clock=clock)
    forecast.add(10, 4, begun_s=400)  # ten minutes to load
    clock.now += 60
    forecast.add(10, 4, begun_s=990)
    assert forecast.left_s() == 8 * 60
    assert forecast.cost() == pytest.approx(4 * (600 + 60 + 480) / 3600 * 2)
    assert forecast.words() == {"left": "8 min 0 s", "cost of all": "2.53"}


def test_a_steady_job_is_foretold_from_its_second_part_on(clock: Clock) -> None:
    """Whatever its parts: the end that is foretold stays the same."""
    forecast, ends = Forecast(100, clock=clock), set()
    forecast.add(5, 1, begun_s=990)
    for size in (1, 4, 10, 30, 50):
        clock.now += 3 * size
        forecast.add(size, 1, begun_s=990)
        ends.add(clock.now + (forecast.left_s() or 0))
    assert ends == {1000 + 3 * 95}
    assert forecast.left_s() == 0
    assert "cost of all" not in forecast.words()


def test_workers_that_begin_together_are_not_taken_for_one_that_is_fast(clock: Clock) -> None:
    forecast = Forecast(100, clock=clock)
    for number in (1, 2, 3, 4):
        clock.now += 0.001
        forecast.add(5, number, begun_s=990)
        assert forecast.left_s() is None
    clock.now += 10
    for _ in range(4):
        forecast.add(5, 4, begun_s=990)
    assert forecast.left_s() == pytest.approx(30)
