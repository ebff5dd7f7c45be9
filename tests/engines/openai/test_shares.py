"""Several who ask one server: never more together than it takes, and none of them starves."""

from __future__ import annotations

import random

import pytest

from helpers.simulated_server import Clock
from vlmray.engines.openai.flow import Flow, Outcome
from vlmray.engines.openai.shares import GONE_S, Report, Shares


@pytest.fixture
def clock() -> Clock:
    return Clock()


def shares_of(limit: int, clock: Clock) -> Shares:
    return Shares(Flow(limit, first=limit, clock=clock), clock)


def test_one_holder_has_it_all(clock: Clock) -> None:
    assert shares_of(10, clock).report(Report(holder="a", num_in_flight=0, num_wanted=1)).places == 10


def test_what_is_told_is_never_more_than_the_limit_and_everybody_gets_a_part(clock: Clock) -> None:
    chance, shares = random.Random(0), shares_of(10, clock)
    places, in_flight = dict.fromkeys("abc", 0), dict.fromkeys("abc", 0)
    served = dict.fromkeys("abc", 0)
    for _ in range(3000):
        clock.now += 0.1
        name = chance.choice("abc")
        ended = chance.randint(0, in_flight[name])
        in_flight[name] -= ended
        in_flight[name] += max(0, min(places[name] - in_flight[name], 20))  # it takes what it was told it may
        served[name] += ended
        outcomes = [Outcome(kind="failed", latency_s=1, level=1)] * ended
        report = Report(holder=name, num_in_flight=in_flight[name], num_wanted=20, outcomes=outcomes)
        places[name] = shares.report(report).places
        assert sum(max(places[each], in_flight[each]) for each in "abc") <= 10
    assert min(served.values()) > 0.8 * max(served.values())


def test_where_there_is_one_place_they_take_turns(clock: Clock) -> None:
    shares, served, places = shares_of(1, clock), dict.fromkeys("ab", 0), dict.fromkeys("ab", 0)
    for _ in range(100):
        clock.now += 0.1
        for name in "ab":
            outcomes = [Outcome(kind="failed", latency_s=0.1, level=1)] * places[name]
            served[name] += places[name]
            report = Report(holder=name, num_in_flight=0, num_wanted=5, outcomes=outcomes)
            places[name] = shares.report(report).places
    assert min(served.values()) > 20


def test_who_wants_little_leaves_the_rest_to_the_others(clock: Clock) -> None:
    shares = shares_of(10, clock)
    for _ in range(3):
        few = shares.report(Report(holder="few", num_in_flight=0, num_wanted=2)).places
        many = shares.report(Report(holder="many", num_in_flight=0, num_wanted=50)).places
    assert (few, many) == (2, 8)


def test_who_is_gone_leaves_his_places(clock: Clock) -> None:
    shares = shares_of(10, clock)
    shares.report(Report(holder="gone", num_in_flight=10, num_wanted=10))
    assert shares.report(Report(holder="here", num_in_flight=0, num_wanted=10)).places == 0
    clock.now = GONE_S + 1
    assert shares.report(Report(holder="here", num_in_flight=0, num_wanted=10)).places == 10


def test_a_refusal_is_of_all_that_was_in_flight(clock: Clock) -> None:
    shares = shares_of(10, clock)
    shares.report(Report(holder="a", num_in_flight=6, num_wanted=6))
    refused = Outcome(kind="refused", latency_s=0.1, level=3)
    shares.report(Report(holder="b", num_in_flight=2, num_wanted=3, outcomes=[refused]))
    assert shares.flow.refused.most == 8  # nine were too many, not three
