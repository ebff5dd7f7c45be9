"""How many requests are in flight: found without hurting the server, and found again when it changes."""

from __future__ import annotations

import random

import pytest

from helpers.simulated_server import Clock, Simulation, takes
from vlmray.engines.openai.flow import Flow, Outcome, Slowness


@pytest.mark.parametrize("capacity", [1, 3, 24, 100])
@pytest.mark.parametrize("most_tokens", [1, 8])
def test_a_hard_limit_is_found_and_then_kept(capacity: int, most_tokens: int) -> None:
    simulation = Simulation(takes(capacity, most_tokens=most_tokens))
    simulation.run(240)
    found = [at for at in simulation.refused_at if at > 120]
    assert len(found) <= 2  # it is tried again now and then, with one request
    assert capacity * 0.9 <= simulation.mean_in_flight(120) <= capacity + 0.1


@pytest.mark.parametrize("seed", range(3))
def test_refusals_at_random_are_no_limit(seed: int) -> None:
    simulation = Simulation(takes(10**6, faults=0.05), seed=seed)
    simulation.run(120)
    assert simulation.mean_in_flight(60) > 18
    limited = Simulation(takes(24, faults=0.05), seed=seed)
    limited.run(120)
    assert limited.mean_in_flight(60) > 18


def test_it_begins_with_a_few_and_grows_as_long_as_answers_are_fast() -> None:
    simulation = Simulation(takes(10**6), most=64)
    assert simulation.flow.limit <= 8
    simulation.run(10)
    assert simulation.flow.limit == 64
    assert max(count for _, count in simulation.in_flight) == 64
    growth = [count for at, count in simulation.in_flight if at < 1]
    assert max(growth) < 32


def test_longer_answers_are_not_taken_for_slowness() -> None:
    simulation = Simulation(takes(10**6, latency_s=0.02, most_tokens=300))
    simulation.run(60)
    assert simulation.flow.limit == 256


def test_a_server_that_only_queues_is_not_flooded() -> None:
    simulation = Simulation(lambda now, in_flight, chance: ("answered", 0.05 * in_flight, 5))
    simulation.run(60)
    assert simulation.mean_in_flight(10) < 16
    assert simulation.num_answered > 0.9 * 60 / 0.05  # and has always something to do


def test_a_server_that_slows_down_gets_less_and_then_more_again() -> None:
    def slow_for_a_while(now: float, in_flight: int, chance: random.Random) -> tuple[str, float, int]:
        return "answered", 5.0 if 30 < now < 90 else 0.5, 5

    simulation = Simulation(slow_for_a_while, most=64)
    simulation.run(30)
    assert simulation.flow.limit == 64
    simulation.run(90)
    assert simulation.flow.limit < 16
    simulation.run(240)
    assert simulation.flow.limit > 40


def test_after_an_outage_it_is_soon_as_before() -> None:
    def outage(now: float, in_flight: int, chance: random.Random) -> tuple[str, float, int]:
        return ("refused", 0.01, 0) if 30 < now < 60 else ("answered", 0.5, 5)

    simulation = Simulation(outage, most=64)
    simulation.run(59)
    assert simulation.flow.limit == 1
    simulation.run(70)
    assert simulation.flow.limit == 64


def refusal(latency_s: float = 0.01, level: int = 4, retry_after_s: float = 0.0) -> Outcome:
    return Outcome(kind="refused", latency_s=latency_s, level=level, retry_after_s=retry_after_s)


def test_retry_after_holds_for_everybody_and_a_shorter_one_takes_nothing_off() -> None:
    clock = Clock()
    flow = Flow(64, clock=clock)
    flow.note(refusal(retry_after_s=30))
    clock.now = 10
    assert flow.pause_s == pytest.approx(20)
    flow.note(refusal(retry_after_s=5))
    assert flow.pause_s == pytest.approx(20)
    clock.now = 31
    assert flow.pause_s == 0
    assert flow.silent_s == pytest.approx(1)  # what the server asked for is no silence


def test_requests_that_were_sent_before_shrink_the_limit_once() -> None:
    clock = Clock()
    flow = Flow(64, first=40, clock=clock)
    clock.now = 10
    for level in range(40, 30, -1):
        flow.note(refusal(latency_s=1, level=level))
    assert 25 < flow.limit < 30
    clock.now = 12
    flow.note(refusal(latency_s=1, level=20))
    assert flow.limit < 20


def test_only_words_of_the_server_end_its_silence() -> None:
    clock = Clock()
    flow = Flow(64, clock=clock)
    clock.now = 50
    flow.note(Outcome(kind="lost", latency_s=1, level=1))
    assert flow.silent_s == 50
    flow.note(refusal())
    assert (flow.silent_s, flow.unanswered_s) == (0, 50)
    clock.now = 60
    flow.note(Outcome(kind="answered", latency_s=1, level=1))
    assert (flow.silent_s, flow.unanswered_s) == (0, 0)
    clock.now = 100
    flow.begin()
    assert flow.silent_s == 0


def test_patience_grows_with_what_answers_take() -> None:
    flow = Flow(64, clock=Clock())
    assert flow.patience_s == float("inf")
    flow.note(Outcome(kind="answered", latency_s=0.1, level=1))
    assert flow.patience_s == 10
    flow.note(Outcome(kind="answered", latency_s=6, level=1))
    assert flow.patience_s == 48


def test_alone_an_answer_is_as_fast_as_can_be() -> None:
    slowness = Slowness()
    fast = Outcome(kind="answered", latency_s=0.1, level=1, num_tokens=(9, 9))
    slow = Outcome(kind="answered", latency_s=1.0, level=1, num_tokens=(9, 9))
    slowness.note(fast, is_alone=False)
    for _ in range(30):
        mean = slowness.note(slow, is_alone=False)
    assert mean > 4
    for _ in range(30):
        mean = slowness.note(slow, is_alone=True)
    assert mean == pytest.approx(1, abs=0.2)
