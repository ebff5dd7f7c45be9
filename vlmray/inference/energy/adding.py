"""What a run's cards took: of each the last reading less the first, however many replicas read it."""

from __future__ import annotations

from collections.abc import Sequence

from vlmray.inference.energy.reading import Reading

_MILLIJOULES_PER_KWH = 3.6e9

_SAME_TIME_S = 1.0
"""A thread can be held up between clock and counter: readings so near may come in the other order."""


class Energy:
    """The energy of a run, from readings in any order; of each card two are kept."""

    def __init__(self) -> None:
        self._ends: dict[str, tuple[Reading, Reading]] = {}
        self._is_told = True

    def add(self, readings: Sequence[Reading]) -> None:
        """Add what a replica read; nothing, if its cards do not tell."""
        self._is_told &= bool(readings)
        for reading in readings:
            ends = sorted([*self._ends.get(reading.card, ()), reading])
            self._is_told &= not any(map(_goes_back, ends, ends[1:]))
            self._ends[reading.card] = ends[0], ends[-1]

    @property
    def kwh(self) -> float | None:
        """Kilowatt-hours from each card's first reading to its last; None where a card did not tell."""
        taken = [last.millijoules - first.millijoules for first, last in self._ends.values()]
        return sum(taken) / _MILLIJOULES_PER_KWH if self._is_told and taken and min(taken) > 0 else None


def _goes_back(first: Reading, second: Reading) -> bool:
    """Tell whether a counter began anew, with its driver."""
    return second.millijoules < first.millijoules and second.at_s - first.at_s > _SAME_TIME_S
