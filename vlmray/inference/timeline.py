"""When each stage of a pipeline worked, and how much of the work went on behind the model's.

    spans of each chunk -> Timeline -> stage_seconds, overlap, lanes, energy

A span says when a chunk was in a stage, by the clock of the machine it was on: what compares machines is as
exact as their clocks agree. A span is kept as four numbers; neighbours are joined where there are many, and
lanes have a fixed number of bins, so a long run takes no more than a short one. Drawing is up to `lanes.py`.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlmray.inference.energy.adding import Energy
from vlmray.inference.energy.reading import Reading
from vlmray.reports.lanes import Lane

STAGES = ("read", "prepare", "load", "generate", "write")
"""In the order in which a chunk goes through them; `load` is the model, once for each replica."""

MODEL_STAGES = ("load", "generate")

NUM_BINS = 300
"""Bins of a lane: about as many as there are pixels to tell them apart on a phone."""

MAX_REPLICA_LANES = 8
"""More replicas than this share a lane."""

MOST_SPANS = 2000
"""Spans of a stage, or of one replica in it, that are kept before neighbours are joined."""

Floats = NDArray[np.float64]


class Span(NamedTuple):
    """A stage at work on a chunk."""

    stage: str
    started_s: float
    """Seconds since the epoch."""

    ended_s: float
    waited_s: float = 0.0
    """Seconds of it in which there was nothing to work on yet."""

    replica: str = ""
    """Which one, in the stages of the model."""

    readings: tuple[Reading, ...] = ()
    """What its cards had taken when it began to load, or had an answer; none where they do not tell."""


class Watch:
    """Times a stage: a clock says when it began, a counter how long it took, so nobody's clock goes back."""

    def __init__(self) -> None:
        self._started_s = time.time()
        self._counter_s = time.perf_counter()

    def span(self, stage: str, **details: Any) -> Span:
        """Return the span from the making of this watch until now."""
        return Span(
            stage, self._started_s, self._started_s + time.perf_counter() - self._counter_s, **details
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """How well the model was kept busy."""

    model_busy_share: float
    """Time in which replicas worked, of the time from when each was loaded to its last answer."""

    model_waited_s: float
    """The rest of that time, summed over replicas."""

    cpu_hidden_share: float
    """Time of the other stages in which some replica was loading or worked, of all their time."""


class Timeline:
    """The spans of a run, collected as its chunks finish."""

    def __init__(self) -> None:
        self._spans: dict[tuple[str, str], array[float]] = {}
        self._energy = Energy()

    def add(self, spans: Iterable[Span]) -> None:
        """Add what is known of a chunk."""
        for span in spans:
            if span.stage in MODEL_STAGES:
                self._energy.add(span.readings)
            key, seconds = (span.stage, span.replica), span.ended_s - span.started_s
            found = self._spans.setdefault(key, array("d"))
            found.extend((span.started_s, span.ended_s, seconds, seconds - span.waited_s))
            if len(found) >= 4 * MOST_SPANS:
                self._spans[key] = _join(found)

    @property
    def replicas(self) -> list[str]:
        """The replicas that answered, in order of their first answers."""
        return [replica for stage, replica in self._spans if stage == "generate"]

    @property
    def elapsed_s(self) -> float:
        """Seconds from the first begin of a stage to the last end; 0 without spans."""
        spans = self._select(STAGES)
        return float(spans[:, 1].max() - spans[:, 0].min()) if len(spans) else 0.0

    @property
    def energy_kwh(self) -> float | None:
        """What cards took, each from its first loading to its last answer; None where one does not tell."""
        return self._energy.kwh

    def stage_seconds(self) -> dict[str, float]:
        """Sum the seconds that chunks were in each stage; empty without spans."""
        found = {stage: self._select([stage]) for stage in STAGES}
        return {stage: _seconds(spans) for stage, spans in found.items() if len(spans)}

    def overlap(self) -> Overlap | None:
        """Return how busy the model was kept; None where nothing was generated."""
        if not self.replicas:
            return None
        worked_s = self.used_s()
        available_s = sum(map(self._available_s, self.replicas))
        model_work = _work_until(self._select(MODEL_STAGES))
        others = self._select([stage for stage in STAGES if stage not in MODEL_STAGES])
        lengths = others[:, 1] - others[:, 0]
        shares = _ratio(model_work(others[:, 1]) - model_work(others[:, 0]), lengths)
        hidden_s = float((shares * others[:, 2]).sum())
        return Overlap(
            model_busy_share=_share(worked_s, available_s),
            model_waited_s=max(0.0, available_s - worked_s),
            cpu_hidden_share=_share(hidden_s, _seconds(others)),
        )

    def held_s(self, most: int) -> float:
        """Return the seconds that replicas were held: each from its loading on, to the run's last answer.

        Args:
            most: Replicas at a time; those beyond came in the place of others.
        """
        begins = sorted(self._select(MODEL_STAGES, replica)[:, 0].min() for replica in self.replicas)[:most]
        end_s = self._select(["generate"])[:, 1].max(initial=0)
        return float(sum(end_s - begin_s for begin_s in begins))

    def used_s(self) -> float:
        """Return the seconds in which replicas worked on answers, be it on one chunk or on several."""
        ends = np.full(1, np.inf)
        parts = (_work_until(self._select(["generate"], replica))(ends) for replica in self.replicas)
        return float(sum(part.item() for part in parts))

    def lanes(self) -> list[Lane]:
        """Return a lane for each stage, and for each replica unless there are many; none without spans."""
        begin_s = self._select(STAGES)[:, 0].min(initial=np.inf)
        edges = begin_s + np.linspace(0, self.elapsed_s, NUM_BINS + 1)
        lanes: list[Lane] = []
        for stage in self.stage_seconds():
            parts = self.replicas if stage == "generate" else [None]
            levels = [_levels(self._select([stage], part), edges) for part in parts]
            if len(levels) > MAX_REPLICA_LANES:
                levels = [np.mean(levels, axis=0)]
            for number, level in enumerate(levels, start=1):
                name = stage if len(levels) == 1 else f"{stage} {number}"
                lanes.append(Lane(name=name, levels=level.tolist(), color=int(stage not in MODEL_STAGES)))
        return lanes

    def _select(self, stages: Collection[str], replica: str | None = None) -> Floats:
        """Return begin, end, seconds, seconds of work (N, 4) of spans in stages, of one replica or all."""
        spans = [
            np.frombuffer(found).reshape(-1, 4)
            for (stage, name), found in self._spans.items()
            if stage in stages and replica in (None, name)
        ]
        return np.concatenate([np.empty((0, 4)), *spans])

    def _available_s(self, replica: str) -> float:
        """Return the seconds from when a replica was loaded to the end of its last answers."""
        loads, answers = self._select(["load"], replica), self._select(["generate"], replica)
        return float(answers[:, 1].max() - loads[:, 1].min(initial=answers[:, 0].min()))


def _join(spans: array[float]) -> array[float]:
    """Join each span with the one that began next: half as many, that work as long.

    Where several are at work at a time, what they cover together is rounded up to whole spans.
    """
    table = np.frombuffer(spans).reshape(-1, 4)
    first, second = table[np.argsort(table[:, 0])].reshape(-1, 2, 4).transpose(1, 2, 0)
    end = np.maximum(first[1], second[1])
    shared = np.clip(np.minimum(first[1], second[1]) - second[0], 0, None)
    work = np.minimum(first[3] + second[3], first[2] + second[2] - shared)
    return array("d", np.stack([first[0], end, first[2] + second[2], work], axis=1).tobytes())


def _seconds(spans: Floats) -> float:
    return float(spans[:, 2].sum())


def _share(part: float, whole: float) -> float:
    """Return a share of at most 1, whatever the clocks say; of nothing, all."""
    return min(1.0, part / whole) if whole > 0 else 1.0


def _work_until(spans: Floats) -> Callable[[Floats], Floats]:
    """Return a function of times: the seconds before each in which any of the spans worked.

    Where spans overlap, they count once. What a span waited is spread evenly over it.
    """
    if not len(spans):
        return np.zeros_like
    spans = spans[np.argsort(spans[:, 0])]
    latest = np.maximum.accumulate(spans[:, 1])
    firsts = np.flatnonzero(np.append(True, spans[1:, 0] > latest[:-1]))  # each begins a stretch of work
    begin, end = spans[firsts, 0], np.maximum.reduceat(spans[:, 1], firsts)
    work = np.minimum(np.add.reduceat(spans[:, 3], firsts), end - begin)
    done = np.cumsum(work)
    edges, values = np.column_stack([begin, end]).ravel(), np.column_stack([done - work, done]).ravel()
    return lambda times: np.interp(times, edges, values)


def _levels(spans: Floats, edges: Floats) -> Floats:
    """Return the share of each bin in which any of the spans worked."""
    return np.clip(_ratio(np.diff(_work_until(spans)(edges)), np.diff(edges)), 0, 1)


def _ratio(parts: Floats, wholes: Floats) -> Floats:
    return np.divide(parts, wholes, out=np.zeros_like(wholes), where=wholes > 0)
