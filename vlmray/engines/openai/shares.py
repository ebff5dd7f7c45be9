"""One limit for several who ask the same server: how many requests each of them may have in flight.

    Report of a holder -> Shares.report -> Allowance: its places, and what is known of the server

What a holder may have is never more than what is left of the limit by what the others were told, or still
have in flight: its share shrinks at once, and grows when somebody else has heard of his. Holders that report
nothing for a while are gone. Nothing waits here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from vlmray.engines.openai.flow import Flow, Outcome

GONE_S = 15.0
"""A holder that wants something reports more often than that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a holder says of itself."""

    holder: str
    num_in_flight: int
    num_wanted: int
    """In flight, or waiting for a place or for another try."""

    outcomes: Sequence[Outcome] = ()
    """What became of requests since its last report, as it saw them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """How it goes with a server; what is of the same name in `Flow` is that."""

    limit: float = 0.0
    num_wanted: int = 0
    """Of all holders."""

    pause_s: float = 0.0
    silent_s: float = 0.0
    unanswered_s: float = 0.0
    patience_s: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What a holder may do until it hears more."""

    places: int
    """Requests that it may have in flight."""

    state: State


class Keeper(Protocol):
    """Whoever has the limit: here, or on another machine."""

    pace_s: float
    """Seconds between reports, at least."""

    async def report(self, report: Report) -> Allowance:
        """Take a report and say what its holder may do."""
        ...


@dataclass(slots=True)
class _Holder:
    places: int = 0
    num_in_flight: int = 0
    num_wanted: int = 0
    seen_at: float = 0.0
    served_at: float = field(default=0.0)
    """When one of its requests ended last."""

    @property
    def held(self) -> int:
        return max(self.places, self.num_in_flight)


class Shares:
    """The limit of one server among its holders.

    Args:
        flow: The limit.
        clock: Seconds; that of the flow.
    """

    def __init__(self, flow: Flow, clock: Callable[[], float] = time.monotonic) -> None:
        self.flow = flow
        self._clock = clock
        self._holders: dict[str, _Holder] = {}

    @property
    def num_in_flight(self) -> int:
        """Requests in flight, as far as holders have reported."""
        return sum(holder.num_in_flight for holder in self._holders.values())

    @property
    def num_wanted(self) -> int:
        """The same, and those that wait."""
        return sum(holder.num_wanted for holder in self._holders.values())

    def report(self, report: Report) -> Allowance:
        """Take a report and say what its holder may do."""
        now = self._clock()
        self._holders = {name: each for name, each in self._holders.items() if now - each.seen_at < GONE_S}
        if not self.num_wanted:
            self.flow.begin()
        holder = self._holders.setdefault(report.holder, _Holder())
        others = self.num_in_flight - holder.num_in_flight
        for outcome in report.outcomes:
            self.flow.note(replace(outcome, level=outcome.level + others))
            holder.served_at = now
        holder.num_in_flight, holder.num_wanted, holder.seen_at = report.num_in_flight, report.num_wanted, now
        left = int(self.flow.limit) - sum(each.held for each in self._holders.values() if each is not holder)
        holder.places = max(0, min(self._share(holder), left))
        return Allowance(places=holder.places, state=self.state())

    def state(self) -> State:
        """Return how it goes."""
        flow = self.flow
        return State(
            limit=flow.limit,
            num_wanted=self.num_wanted,
            pause_s=flow.pause_s,
            silent_s=flow.silent_s,
            unanswered_s=flow.unanswered_s,
            patience_s=flow.patience_s,
        )

    def _share(self, holder: _Holder) -> int:
        """Divide the limit by what is wanted; who wants less than his part leaves the rest to the others.

        Of those who want more, the ones that were served last come last: where the limit is smaller than
        their number, they take turns.
        """
        left = int(self.flow.limit)
        greedy = sorted(self._holders.values(), key=lambda each: (each.num_wanted, each.served_at))
        if len(greedy) == 1:
            return left
        while greedy[0].num_wanted * len(greedy) <= left:
            modest = greedy.pop(0)
            if modest is holder:
                return modest.num_wanted
            left -= modest.num_wanted
        greedy.sort(key=lambda each: each.served_at)
        return left // len(greedy) + (greedy.index(holder) < left % len(greedy))


class LocalKeeper:
    """A limit that nobody shares.

    Args:
        flow: The limit.
    """

    pace_s = 0.0

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._shares = Shares(flow)

    async def report(self, report: Report) -> Allowance:
        """Take a report and say what its holder may do."""
        return self._shares.report(report)
