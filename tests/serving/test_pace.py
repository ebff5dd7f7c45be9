"""Those who are turned away come back when there is room, and not together."""

from __future__ import annotations

from collections import Counter

import pytest

from vlmray.serving import pace as module
from vlmray.serving.pace import Pace


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_nobody_comes_back_before_there_is_room(clock: list[float]) -> None:
    pace, per_s = Pace(), 10
    for _ in range(100):
        clock[0] += 1 / per_s
        pace.answered(clock[0] - 2.0)
    waits = [pace.turn_away() for _ in range(100)]
    assert waits == sorted(waits)
    back = Counter(waits)
    for second in range(1, max(waits) + 1):
        assert sum(back[s] for s in range(second + 1)) <= per_s * second  # those who found room by then
    assert max(waits) <= 3 * 100 / per_s


def test_times_are_such_that_clients_heed_them(clock: list[float]) -> None:
    pace = Pace()
    assert {pace.turn_away() for _ in range(5000)} == set(range(1, 61))  # more than 60 s is not heeded
    clock[0] += 3600
    assert pace.turn_away() == 1  # who came long ago is not waited for


def test_one_batch_is_no_pace_of_thousands(clock: list[float]) -> None:
    pace, came = Pace(), clock[0]
    clock[0] += 8
    for _ in range(16):
        pace.answered(came)
    assert [pace.turn_away() for _ in range(16)][-1] in range(16, 20)
    clock[0] += 60  # what was then says nothing of now
    assert pace.turn_away() == 1
