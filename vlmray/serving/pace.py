"""When clients that were turned away may come back."""

from __future__ import annotations

import math
import time
from collections import deque

_WINDOW_S = 30.0
_GUESS = 16.0  # answers a second, until there are some to tell by
_LONGEST_S = 60.0  # clients of OpenAI take a longer time for a mistake and come back at once
_MARGIN = 2.0  # nothing is lost by it: who waits in line keeps the model busy meanwhile


class Pace:
    """How fast answers are given, and the places in a line of those who were turned away.

    Each gets the time at which the answers given until then have made room for all before it, so they do not
    come back together.
    """

    def __init__(self) -> None:
        self._answers: deque[tuple[float, float]] = deque(maxlen=1024)
        self._next_place = 0.0

    def answered(self, started: float) -> None:
        """Note that an answer was given now to a request that came at a time of `time.monotonic`."""
        self._answers.append((started, time.monotonic()))

    def turn_away(self) -> int:
        """Return after how many seconds a request that finds no room now may come back."""
        now = time.monotonic()
        self._next_place = max(now, self._next_place) + _MARGIN / self._per_s(now)
        wait_s = self._next_place - now
        self._next_place = min(self._next_place, now + _LONGEST_S)
        return math.ceil(min(wait_s, _LONGEST_S))

    def _per_s(self, now: float) -> float:
        while self._answers and self._answers[0][1] < now - _WINDOW_S:
            self._answers.popleft()
        if not self._answers:
            return _GUESS
        return len(self._answers) / max(now - min(started for started, _ in self._answers), 0.001)
