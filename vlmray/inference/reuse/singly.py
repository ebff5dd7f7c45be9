"""Rows that are asked one at a time: each different one once, and those that are known not at all."""

from __future__ import annotations

from collections.abc import Callable

from vlmray.inference.chunks import Reuse
from vlmray.inference.reuse.answers import Known
from vlmray.inference.reuse.folder import Answer
from vlmray.inference.reuse.taking import answers_of, give, give_twin
from vlmray.schema import Row


class AskedOnce:
    """Rows that are being asked, and those that wait for the answers of others.

    Args:
        key_of: As of `taking_over`.
        known: As of `taking_over`.
    """

    def __init__(self, key_of: Callable[[Row], bytes | None], known: Known | None) -> None:
        self._key_of = key_of
        self._known = known
        self._keys: dict[str, bytes] = {}
        self._waiting: dict[bytes, list[Row]] = {}
        self._new: dict[bytes, Answer] = {}
        self.reuse = Reuse()

    def add(self, row: Row) -> list[Row] | None:
        """Return the row if its answer is known, or nothing yet if it waits; None: it has to be asked."""
        if self._known is None or (key := self._key_of(row)) is None:
            return None
        if (twins := self._waiting.get(key)) is not None:
            twins.append(row)
            return []
        if (answer := self._new.get(key)) is not None:
            give(row, answer, is_of_run=True)
        elif found := self._known.find([key]).get(key):
            give(row, found.answer, is_of_run=found.is_of_run)
        else:
            self._keys[row["sample_id"]] = key
            self._waiting[key] = []
            return None
        return self._count([row])

    def answered(self, row: Row) -> list[Row]:
        """Take up what a row was answered; return it with those that waited for it."""
        key = self._keys.pop(row["sample_id"], None)
        if key is None:
            return [row]
        twins = self._waiting.pop(key)
        for twin in twins:
            give_twin(twin, row)
        self._new |= answers_of({key: row})
        return [row, *self._count(twins)]

    def keep(self) -> None:
        """Pass on what was answered since the last time."""
        if self._new and self._known is not None:
            self._known.keep(self._new)
            self._new = {}

    def _count(self, rows: list[Row]) -> list[Row]:
        self.reuse = self.reuse.plus(Reuse.of(rows))
        return rows
