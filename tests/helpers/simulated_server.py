"""A server and those who ask it, without either: the clock goes from one event to the next."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from typing import Any

from vlmray.engines.openai.flow import Flow, Outcome


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


Server = Callable[[float, int, random.Random], tuple[str, float, int]]
"""Time and requests in flight, the new one included -> kind of the outcome, its latency, tokens."""


def takes(capacity: int, latency_s: float = 0.5, faults: float = 0.0, most_tokens: int = 1) -> Server:
    """A server with a hard limit, that refuses at random too, and whose answers are as long as they are."""

    def answer(now: float, in_flight: int, chance: random.Random) -> tuple[str, float, int]:
        if in_flight > capacity or chance.random() < faults:
            return "refused", 0.005, 0
        num_tokens = chance.randint(1, most_tokens)
        return "answered", latency_s * num_tokens * chance.uniform(0.9, 1.1), num_tokens

    return answer


class Simulation:
    """Asks as much as the flow allows.

    Args:
        server: Who is asked.
        most: Requests in flight at most.
        seed: Of chance.
    """

    def __init__(self, server: Server, most: int = 256, seed: int = 0) -> None:
        self.clock = Clock()
        self.flow = Flow(most, clock=self.clock)
        self.server = server
        self.in_flight: list[tuple[float, int]] = []
        """Time, and the number from then on."""

        self.refused_at: list[float] = []
        self.num_answered = 0
        self._chance = random.Random(seed)
        self._events: list[tuple[float, int, Any]] = []
        self._numbers = itertools.count()
        self._count = 0

    def run(self, until: float) -> None:
        while self.clock.now < until:
            while self._count < int(self.flow.limit) and not self.flow.pause_s:
                self._send()
            if not self._events:
                self.clock.now += self.flow.pause_s
                continue
            self.clock.now, _, outcome = heapq.heappop(self._events)
            self._count -= 1
            self.flow.note(outcome)
            self.num_answered += outcome.kind == "answered"
            if outcome.kind == "refused":
                self.refused_at.append(self.clock.now)

    def _send(self) -> None:
        self._count += 1
        self.in_flight.append((self.clock.now, self._count))
        kind, latency_s, num_tokens = self.server(self.clock.now, self._count, self._chance)
        outcome = Outcome(kind=kind, latency_s=latency_s, level=self._count, num_tokens=(100, num_tokens))  # type: ignore[arg-type]
        heapq.heappush(self._events, (self.clock.now + latency_s, next(self._numbers), outcome))

    def mean_in_flight(self, since: float) -> float:
        found = [count for at, count in self.in_flight if at >= since]
        return sum(found) / len(found)
