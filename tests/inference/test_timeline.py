"""A timeline counts each second once, and says what waited for what."""

from __future__ import annotations

import pickle
import random
import time
from array import array

import numpy as np
import pytest

from vlmray.inference.summary import Usage
from vlmray.inference.timeline import MAX_REPLICA_LANES, MOST_SPANS, NUM_BINS, STAGES, Span, Timeline, Watch

EPOCH = 1_700_000_000.0


def span(stage: str, begin: float, end: float, waited_s: float = 0.0, replica: str = "") -> Span:
    return Span(stage, EPOCH + begin, EPOCH + end, waited_s, replica)


def make_timeline(*spans: Span) -> Timeline:
    timeline = Timeline()
    for each in spans:
        timeline.add([each])
    return timeline


def levels(timeline: Timeline) -> dict[str, list[float]]:
    return {lane.name: list(lane.levels) for lane in timeline.lanes()}


def worked_s(timeline: Timeline, lane: str) -> float:
    return sum(levels(timeline)[lane]) * timeline.elapsed_s / NUM_BINS


def test_nothing_done_nothing_shown() -> None:
    timeline = Timeline()
    assert (timeline.stage_seconds(), timeline.overlap(), timeline.lanes(), timeline.elapsed_s) == (
        {},
        None,
        [],
        0,
    )


def test_work_one_after_the_other_hides_nothing() -> None:
    spans = [span("load", 0, 2)]
    for chunk in range(4):
        begin = 2 + 4 * chunk
        spans += [span("read", begin, begin + 1), span("prepare", begin + 1, begin + 2)]
        spans += [span("generate", begin + 2, begin + 3), span("write", begin + 3, begin + 4)]
    overlap = make_timeline(*spans).overlap()
    assert overlap is not None
    assert overlap.cpu_hidden_share == pytest.approx(0, abs=1e-6)
    assert overlap.model_busy_share == pytest.approx(4 / 15)  # until the last answer, not the last file
    assert overlap.model_waited_s == pytest.approx(11)


def test_work_behind_the_model_is_hidden_and_costs_it_nothing() -> None:
    spans = [span("load", 0, 2), span("read", 0, 1), span("prepare", 1, 2)]
    spans += [span("generate", begin, begin + 1) for begin in range(2, 6)]
    spans += [span("read", 2, 3), span("prepare", 2.5, 3.5), span("write", 3, 4), span("write", 5.5, 6.5)]
    overlap = make_timeline(*spans).overlap()
    assert overlap is not None
    assert (overlap.model_busy_share, overlap.model_waited_s) == (
        pytest.approx(1),
        pytest.approx(0, abs=1e-6),
    )
    assert overlap.cpu_hidden_share == pytest.approx(5.5 / 6)


def test_what_a_replica_waits_within_a_span_is_waiting() -> None:
    timeline = make_timeline(span("load", 0, 1), span("generate", 1, 5, waited_s=1))
    overlap = timeline.overlap()
    assert overlap is not None
    assert (overlap.model_busy_share, overlap.model_waited_s) == (pytest.approx(0.75), pytest.approx(1))
    assert worked_s(timeline, "generate") == pytest.approx(3)
    assert max(levels(timeline)["generate"]) == pytest.approx(0.75, abs=1e-6)
    assert timeline.stage_seconds()["generate"] == pytest.approx(4)


def test_each_replica_counts_from_its_loading_to_its_last_answer() -> None:
    spans = [span("load", 0, 1, replica="a"), span("load", 0, 5, replica="b")]
    spans += [span("generate", 1, 5, replica="a"), span("generate", 6, 10, replica="b")]
    timeline = make_timeline(*spans)
    overlap = timeline.overlap()
    assert overlap is not None
    assert (overlap.model_busy_share, overlap.model_waited_s) == (pytest.approx(8 / 9), pytest.approx(1))
    assert [worked_s(timeline, f"generate {number}") for number in (1, 2)] == [pytest.approx(4)] * 2


def test_a_replica_whose_loading_is_not_known_counts_from_its_first_answer() -> None:
    overlap = make_timeline(span("generate", 3, 4), span("generate", 5, 6)).overlap()
    assert overlap is not None
    assert (overlap.model_busy_share, overlap.cpu_hidden_share) == (pytest.approx(2 / 3), 1.0)


def test_times_are_those_of_counting_milliseconds() -> None:
    """Random spans, against a count of the milliseconds that they cover."""
    rng = random.Random(0)
    for _ in range(20):
        spans, begin_ms, work = [], 0, {stage: [] for stage in STAGES}
        for _ in range(rng.randint(1, 12)):
            begin_ms += rng.randint(0, 40)
            end_ms = begin_ms + rng.randint(1, 50)
            spans.append(span("generate", begin_ms / 1000, end_ms / 1000))
            work["generate"].append(range(begin_ms, end_ms))
            begin_ms = end_ms
        for stage in rng.choices(["read", "prepare", "load", "write"], k=rng.randint(1, 30)):
            begin_ms = rng.randint(0, 500)
            end_ms = begin_ms + rng.randint(1, 80)
            spans.append(span(stage, begin_ms / 1000, end_ms / 1000))
            work[stage].append(range(begin_ms, end_ms))
        rng.shuffle(spans)
        timeline = make_timeline(*spans)
        covered = {stage: {ms for part in parts for ms in part} for stage, parts in work.items()}
        behind = covered["load"] | covered["generate"]
        others = [ms for stage in ("read", "prepare", "write") for part in work[stage] for ms in part]
        overlap = timeline.overlap()
        assert overlap is not None
        if others:
            hidden = sum(ms in behind for ms in others) / len(others)
            assert overlap.cpu_hidden_share == pytest.approx(hidden, abs=1e-4)
        for stage, parts in work.items():
            if parts:
                assert worked_s(timeline, stage) == pytest.approx(len(covered[stage]) / 1000, abs=1e-4)
                assert timeline.stage_seconds()[stage] == pytest.approx(sum(map(len, parts)) / 1000, abs=1e-4)
        for each in levels(timeline).values():
            assert all(0 <= level <= 1 for level in each)


@pytest.mark.parametrize("num_replicas", [1, MAX_REPLICA_LANES, 40])
def test_lanes_are_bounded_whatever_the_run_does(num_replicas: int) -> None:
    timeline = Timeline()
    for chunk in range(2_000):
        timeline.add([span("read", chunk, chunk + 3), span("write", chunk + 9, chunk + 9)])
        timeline.add([span("generate", chunk, chunk + 0.5, replica=str(chunk % num_replicas))])
    lanes = timeline.lanes()
    assert [lane.name for lane in lanes][:: len(lanes) - 1] == ["read", "write"]
    assert len(lanes) - 2 == (num_replicas if num_replicas <= MAX_REPLICA_LANES else 1)
    assert {len(lane.levels) for lane in lanes} == {NUM_BINS}
    generated = [level for lane in lanes[1:-1] for level in lane.levels]
    assert sum(generated) / NUM_BINS * len(timeline.replicas) / (len(lanes) - 2) == pytest.approx(
        1_000 / timeline.elapsed_s
    )


def test_a_watch_is_right_while_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    first, second = watch.span("read"), watch.span("generate", waited_s=1.5, replica="a")
    assert first.started_s == second.started_s <= first.ended_s <= second.ended_s
    assert second == Span("generate", first.started_s, second.ended_s, 1.5, "a")


def test_a_long_run_takes_no_more_than_a_short_one_and_says_the_same() -> None:
    rng = random.Random(6)
    spans, begin = [span("load", 0, 2, replica="a")], 2.0
    for _ in range(3 * MOST_SPANS):
        end = begin + rng.uniform(0.5, 1.5)
        spans.append(span("generate", begin, end, waited_s=0.1 * (end - begin), replica="a"))
        spans.append(span("read", begin - rng.uniform(0, 2), end - 0.5))
        begin = end + rng.choice([0.0, 0.4])
    timeline = make_timeline(*spans)
    assert len(pickle.dumps(timeline)) < 2.5 * 32 * MOST_SPANS
    exact = make_timeline()
    exact._spans = {
        key: array("d", [number for s in spans if (s.stage, s.replica) == key for number in (
            s.started_s, s.ended_s, s.ended_s - s.started_s, s.ended_s - s.started_s - s.waited_s)])
        for key in timeline._spans
    }  # fmt: skip
    assert timeline.elapsed_s == exact.elapsed_s
    assert timeline.stage_seconds() == pytest.approx(exact.stage_seconds())
    found, expected = timeline.overlap(), exact.overlap()
    assert found is not None
    assert expected is not None
    assert found.model_busy_share == pytest.approx(expected.model_busy_share)
    assert found.model_waited_s == pytest.approx(expected.model_waited_s)
    assert found.cpu_hidden_share == pytest.approx(expected.cpu_hidden_share, abs=0.02)
    for lane, exact_lane in zip(timeline.lanes(), exact.lanes(), strict=True):
        allowed = 0.01 if lane.name == "generate" else 0.08  # of what overlaps, the gaps are lost
        assert np.mean(lane.levels) == pytest.approx(np.mean(exact_lane.levels), abs=allowed)


def test_a_replica_that_answers_two_chunks_at_a_time_works_once() -> None:
    timeline = make_timeline(span("generate", 0, 10, replica="a"), span("generate", 4, 12, replica="a"))
    assert timeline.used_s() == 12
    overlap = timeline.overlap()
    assert overlap is not None
    assert (overlap.model_busy_share, overlap.model_waited_s) == (1.0, 0.0)


def test_what_replicas_hold_is_counted_from_their_loading_to_the_last_answer_of_all() -> None:
    timeline = Timeline()
    timeline.add([Span("load", 0, 10, replica="a"), Span("generate", 10, 30, 5, replica="a")])
    timeline.add([Span("load", 5, 20, replica="b"), Span("generate", 20, 40, replica="b")])
    assert timeline.held_s(2) == 40 + 35
    assert timeline.used_s() == 15 + 20
    timeline.add([Span("load", 32, 36, replica="c"), Span("generate", 36, 50, replica="c")])
    assert timeline.held_s(2) == 50 + 45  # it came in the place of one that was lost
    assert timeline.held_s(3) == 50 + 45 + 18
    assert Timeline().held_s(1) == 0


def test_a_price_makes_a_cost() -> None:
    used = {"unit": "GPU", "held_s": 7200.0, "used_s": 3600.0, "num_answered": 500}
    usage = Usage.of(**used, price_per_hour=2.5)
    assert (usage.cost, usage.answers_per_hour, usage.cost_of_1000) == (5.0, 250.0, 10.0)
    assert Usage.of(**used, price_per_hour=None).cost is None
    assert Usage.of(**{**used, "num_answered": 0}, price_per_hour=2.5).cost_of_1000 is None
