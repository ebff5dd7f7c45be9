"""Answers that may be asked for again, by the keys of their requests: in memory, and in a cache's parts.

Memory is bounded: what nobody asked for longest goes first. What a cache holds stays there, and is read a
part at a time. What cannot be read is asked for again, what cannot be written is not kept, and both are told.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol, TypeVar

import pyarrow as pa

from vlmray.errors import RunError, one_line
from vlmray.inference.reuse.folder import Answer, AnswerFolder
from vlmray.storage.threads import map_ahead

T = TypeVar("T")

_MOST_CHARS = 128 << 20
_CHARS_BESIDE = 500
"""What an answer takes in memory beside its texts, about."""


class Found(NamedTuple):
    """An answer that is known."""

    answer: Answer

    is_of_run: bool
    """Whether this run had it; else it is of an earlier one."""


class Known(Protocol):
    """Whoever knows answers; several threads may ask."""

    def find(self, keys: Iterable[bytes]) -> dict[bytes, Found]:
        """Return what is known of some keys."""
        ...

    def keep(self, answers: Mapping[bytes, Answer]) -> None:
        """Take up what was answered."""
        ...


class Answers:
    """The answers of one model.

    Args:
        folder: Part of a cache that is of the model; None: they are for this run alone.
        most_chars: What is held in memory.
    """

    def __init__(self, folder: AnswerFolder | None = None, most_chars: int = _MOST_CHARS) -> None:
        self._folder = folder
        self._most_chars = most_chars
        self._held: OrderedDict[bytes, Found] = OrderedDict()
        self._num_chars = 0
        self._lock = threading.Lock()
        self._problems: list[str] = []
        self._places: dict[bytes, str] = {}
        """The part of the cache that has an answer."""

        self._own: set[str] = set()
        """Parts that this run wrote."""

        parts: list[str] = self._try(folder.parts, []) if folder else []
        for part, keys in zip(parts, map_ahead(self._keys, parts), strict=True):
            self._places |= dict.fromkeys(keys, part)

    def find(self, keys: Iterable[bytes]) -> dict[bytes, Found]:
        """Return what is known of some keys."""
        wanted = set(keys)
        with self._lock:
            found = {key: self._held[key] for key in wanted if key in self._held}
            for key in found:
                self._held.move_to_end(key)
            for part, answers in self._read_parts(wanted - found.keys()):
                for key, answer in answers.items():
                    self._hold(key, each := Found(answer, part in self._own))
                    if key in wanted:
                        found.setdefault(key, each)
        return found

    def keep(self, answers: Mapping[bytes, Answer]) -> None:
        """Take up what was answered."""
        with self._lock:
            new = {key: answer for key, answer in answers.items() if key not in self._places}
            for key, answer in new.items():
                self._hold(key, Found(answer, is_of_run=True))
            if new and self._folder is not None:
                self._write(new)

    def problems(self) -> str | None:
        """Say what could not be read or written."""
        if not self._problems:
            return None
        others = len(self._problems) - 1
        return self._problems[0] + (f" (and {others} more of the kind)" if others else "")

    def _read_parts(self, keys: Iterable[bytes]) -> Iterator[tuple[str, dict[bytes, Answer]]]:
        parts = sorted({self._places[key] for key in keys if key in self._places})
        for part, answers in zip(parts, map_ahead(self._read, parts), strict=True):
            if not answers:  # it cannot be read, and is not tried again
                self._places = {key: place for key, place in self._places.items() if place != part}
            yield part, answers

    def _hold(self, key: bytes, found: Found) -> None:
        if key in self._held:
            return
        self._held[key] = found
        self._num_chars += found.answer.num_chars + _CHARS_BESIDE
        while self._num_chars > self._most_chars:
            _, oldest = self._held.popitem(last=False)
            self._num_chars -= oldest.answer.num_chars + _CHARS_BESIDE

    def _write(self, answers: Mapping[bytes, Answer]) -> None:
        assert self._folder is not None
        try:
            part = self._folder.write(answers)
        except (OSError, ValueError, RunError, pa.ArrowException) as error:
            self._problems.append(f"--answer_cache: answers are not kept: {one_line(error, 500)}")
        else:
            self._own.add(part)
            self._places |= dict.fromkeys(answers, part)

    def _keys(self, part: str) -> list[bytes]:
        return self._try(lambda: self._folder.keys(part) if self._folder else [], [])

    def _read(self, part: str) -> dict[bytes, Answer]:
        return self._try(lambda: self._folder.read(part) if self._folder else {}, {})

    def _try(self, action: Callable[[], T], otherwise: T) -> T:
        """Read what may not be there without harm, and note where it is not."""
        try:
            return action()
        except (OSError, ValueError) as error:
            self._problems.append(one_line(error, 500))
            return otherwise
