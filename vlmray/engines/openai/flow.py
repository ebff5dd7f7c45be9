"""How many requests a server can take, told by how it takes them.

    Outcome, of each request -> Flow.note -> Flow.limit, pause_s, patience_s, silent_s

It begins with a few in flight. While answers come as fast as they did, each one makes room for one more,
which is twice as many in every round, until the server first objects; then there is one more in every round.
What the server says of its limits counts at once: a refusal takes off a part of what may be in flight, once
for all requests that were sent before, `Retry-After` stops all of them, and a number that was refused is not
reached again for minutes. The clock is the caller's, and nothing here waits.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

MOST_IN_FLIGHT = 256
"""Default of the most that may be in flight."""

_FIRST = 4
_KEPT = 0.7
"""What a refusal, or slowness, leaves of the limit."""

_SLOW = 4.0
"""Times the best latency of its size: a server that takes so long has requests wait in line, and no more of
them are answered by sending more."""

_RECENT_S = 30.0
_TENTATIVE = 2.0
_CERTAIN_S = 120.0
_LONGEST_S = 1920.0
_REFUTED, _CONFIRMED = 3, -2
_LEAST_PATIENCE_S, _PATIENCE = 10.0, 8.0
_NUM_LATENCIES = 200
_NUM_WATCHED = 8
_UNKNOWN_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a server took a request."""

    kind: Literal["answered", "refused", "lost", "failed"]
    """refused: it says that it has too much to do. lost: no answer came. failed: it had an accident with this
    one, which says nothing of the others."""

    latency_s: float
    """From its sending to its end."""

    level: int
    """Requests in flight when it was sent, itself included."""

    num_tokens: tuple[int, int] = (0, 0)
    """Of prompt and answer."""

    retry_after_s: float = 0.0


class Flow:
    """The limit of one server.

    Args:
        most: Requests in flight at most, whatever the server takes.
        first: How many it begins with.
        clock: Seconds.
    """

    def __init__(self, most: int, first: float = _FIRST, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = max(1.0, min(first, most))
        """Requests that may be in flight; what is behind the point counts when it has become one."""
        self.refused = Refused(clock)
        self.slowness = Slowness()
        self._most = most
        self._clock = clock
        self._steep_below = math.inf
        self._shrunk_at = -math.inf
        self._paused_until = -math.inf
        self._heard_at = self._answered_at = clock()
        self._latencies: deque[float] = deque(maxlen=_NUM_LATENCIES)

    @property
    def pause_s(self) -> float:
        """Seconds for which the server wants no requests."""
        return max(0.0, self._paused_until - self._clock())

    @property
    def silent_s(self) -> float:
        """Seconds since it last said anything, or since something was last asked."""
        return max(0.0, self._clock() - max(self._heard_at, self._paused_until))

    @property
    def unanswered_s(self) -> float:
        """Seconds since its last answer, or since something was last asked."""
        return max(0.0, self._clock() - self._answered_at)

    @property
    def patience_s(self) -> float:
        """Seconds after which an answer is given up as lost; infinite as long as there was none."""
        slowest = max(self._latencies, default=math.inf)
        return max(_LEAST_PATIENCE_S, _PATIENCE * slowest)

    def begin(self) -> None:
        """Be asked again after a time in which nobody wanted anything."""
        self._heard_at = self._answered_at = self._clock()

    def note(self, outcome: Outcome) -> None:
        """Learn from what became of a request."""
        now = self._clock()
        sent_at = now - outcome.latency_s
        if outcome.kind != "lost":
            self._heard_at = now
        if outcome.kind == "answered":
            self._answered_at = now
            self._latencies.append(outcome.latency_s)
            if self.refused.answered(outcome.level, sent_at):
                self._steep_below = math.inf
            self._answered(outcome)
        elif outcome.kind != "failed":
            if outcome.retry_after_s:
                self._paused_until = max(self._paused_until, now + outcome.retry_after_s)
            says_little = self.refused.refused(outcome.level, sent_at, self._usual_s())
            self._shrink(outcome, regain=says_little)
            if outcome.level <= 1:  # it takes nothing now; once it does, it may be as much as ever
                self._steep_below = math.inf
        self.limit = max(1.0, min(self.limit, self._most, self.refused.most))

    def _usual_s(self) -> float:
        return statistics.median(self._latencies) if self._latencies else _UNKNOWN_S

    def _answered(self, outcome: Outcome) -> None:
        slowness = self.slowness.note(outcome, is_alone=self.limit < 2)
        if slowness > _SLOW:
            self._shrink(outcome, regain=False)
        elif slowness < _SLOW / 2 and 2 * outcome.level >= self.limit:  # more would be used
            self.limit += 1 if self.limit < self._steep_below else 1 / self.limit

    def _shrink(self, outcome: Outcome, *, regain: bool) -> None:
        """Take off a part, once for all that was sent before.

        Args:
            outcome: Why.
            regain: Whether to be back soon, as it says little of the limit.
        """
        now = self._clock()
        if now - outcome.latency_s < self._shrunk_at:
            return
        before, self.limit = self.limit, self.limit * _KEPT
        self._steep_below = before if regain else self.limit
        self._shrunk_at = now
        self.slowness.forget()


class Refused:
    """What is known of the number in flight that a server refuses.

    Servers also refuse at random, or for others' sake. So a number counts as too many where more requests
    were refused than answered at it, but at first only until those in flight have told more; for minutes once
    it was tried again and refused again; and no more once requests were answered at it.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._recent: deque[tuple[float, int, int]] = deque()
        self._too_many = math.inf
        self._known_at = self._until = -math.inf
        self._evidence = 0
        self._hold_s = _CERTAIN_S

    @property
    def most(self) -> float:
        """What the limit may be; when it is time, one more than what is known to be taken."""
        return self._too_many if self._clock() >= self._until else self._too_many - 1

    def answered(self, level: int, sent_at: float) -> bool:
        """Note that a request was answered, and tell whether that refutes what was thought."""
        self._note(level, 1)
        self._evidence += level >= self._too_many and sent_at > self._known_at
        is_refuted = self._evidence >= _REFUTED
        if is_refuted:
            self._think(math.inf)
        return is_refuted

    def refused(self, level: int, sent_at: float, usual_s: float) -> bool:
        """Note that one was not, and tell whether that says little of the limit.

        Args:
            level: As in `Outcome`.
            sent_at: When it was sent.
            usual_s: How long answers take.
        """
        self._note(level, -1)
        if level <= 1:  # it takes nothing at all now, whatever it takes at other times
            self._think(math.inf)
            return False
        if level == self._too_many and sent_at > self._known_at:  # it was only tried again
            self._evidence -= 1
            self._hold(usual_s)
            return True
        is_exception = sum(sign for _, at, sign in self._recent if at >= level) > 0
        if level < self._too_many and not is_exception:
            self._think(level)
            self._hold(usual_s)
        return is_exception

    def _think(self, too_many: float) -> None:
        self._too_many, self._known_at = too_many, self._clock()
        self._evidence, self._hold_s = 0, _CERTAIN_S

    def _hold(self, usual_s: float) -> None:
        is_certain = self._evidence <= _CONFIRMED
        self._until = self._clock() + (self._hold_s if is_certain else _TENTATIVE * usual_s)
        if is_certain:
            self._hold_s, self._evidence = min(2 * self._hold_s, _LONGEST_S), 0

    def _note(self, level: int, sign: int) -> None:
        now = self._clock()
        self._recent.append((now, level, sign))
        while self._recent[0][0] < now - _RECENT_S:
            self._recent.popleft()


class Slowness:
    """How many times as long as at best answers take, each compared with answers of its size."""

    def __init__(self) -> None:
        self._best: dict[tuple[int, int], float] = {}
        self.forget()

    def forget(self) -> None:
        """Begin to watch anew; the best times are kept."""
        self._mean = 1.0

    def note(self, outcome: Outcome, *, is_alone: bool) -> float:
        """Add an answer and return the mean of the last ones.

        Args:
            outcome: The answer.
            is_alone: It had the server to itself, so that its time is the best there can be now.
        """
        prompt, answer = outcome.num_tokens
        size = (prompt.bit_length(), answer.bit_length())  # sizes of one kind differ by less than two times
        latency_s = max(outcome.latency_s, 1e-6)
        self._best[size] = latency_s if is_alone else min(self._best.get(size, math.inf), latency_s)
        times = min(latency_s / self._best[size], 2 * _SLOW)  # one that was stuck is not all of them
        self._mean += (times - self._mean) / _NUM_WATCHED
        return self._mean
