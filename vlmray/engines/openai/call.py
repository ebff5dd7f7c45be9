"""One call of an engine that works in the event loop of another thread, and who is to hear of its rows."""

from __future__ import annotations

import dataclasses
import queue
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any

from vlmray.engines.base import Cancelled, OnEnd, OnLogprobs, OnText
from vlmray.engines.loop import BackgroundLoop
from vlmray.schema import Completion

Tell = Callable[[str], None]
"""Called with each piece of a row's text."""

Answer = Callable[[Tell | None], Coroutine[Any, Any, Completion]]
"""Answers a row, and tells of its text where somebody wants to know."""

_LOOK_S = 0.05
"""Between two looks at all rows for those that nobody wants any more."""

_UNWANTED = Completion(
    text="", prompt="", num_prompt_tokens=0, num_completion_tokens=0, finish_reason="cancelled"
)


class Call:
    """What `Engine.generate` promises those that it calls back, kept.

    Args:
        on_text: As there.
        on_end: As there.
        cancelled: As there.
        on_logprobs: As there; a row's are told once all are there.
    """

    def __init__(
        self,
        on_text: OnText | None,
        on_end: OnEnd | None,
        cancelled: Cancelled | None,
        on_logprobs: OnLogprobs | None = None,
    ) -> None:
        self._on_text = on_text
        self._on_end = on_end
        self._cancelled = cancelled
        self._on_logprobs = on_logprobs
        self._events: queue.SimpleQueue[tuple[int, str | Future[Completion]]] = queue.SimpleQueue()
        self._open: dict[int, Future[Completion]] = {}
        self._pieces: defaultdict[int, list[str]] = defaultdict(list)
        self._done: dict[int, Completion] = {}
        self._looked_at = 0.0

    def run(self, loop: BackgroundLoop, answers: Sequence[Answer]) -> list[Completion]:
        """Have rows answered in a loop; return the completions in order.

        Raises:
            Exception: What an answer raised; the others are ended then, as by whatever else ends this call.
        """
        try:
            for place, answer in enumerate(answers):
                self._start(loop, place, answer)
            while self._open:
                self._hear()
        finally:
            for future in self._open.values():
                future.cancel()
        return [self._done[place] for place in range(len(answers))]

    def _start(self, loop: BackgroundLoop, place: int, answer: Answer) -> None:
        if self._is_unwanted(place):
            self._end(place, _UNWANTED)
            return
        listens = self._on_text is not None or self._cancelled is not None
        tell = (lambda piece: self._events.put((place, piece))) if listens else None
        future = loop.submit(answer(tell))
        self._open[place] = future
        future.add_done_callback(lambda future: self._events.put((place, future)))

    def _hear(self) -> None:
        """Wait for what happens next, to a row or to its reader."""
        try:
            place, event = self._events.get(timeout=_LOOK_S if self._cancelled else None)
        except queue.Empty:
            self._look()
            return
        if place not in self._open:
            return  # it was unwanted by then
        if isinstance(event, Future):
            del self._open[place]
            self._end(place, event.result())
        elif self._is_unwanted(place):
            self._cut_off(place)
        else:
            self._pieces[place].append(event)
            if self._on_text is not None:
                self._on_text(place, event)
        if self._cancelled and time.monotonic() - self._looked_at > _LOOK_S:
            self._look()

    def _look(self) -> None:
        for place in [place for place in self._open if self._is_unwanted(place)]:
            self._cut_off(place)
        self._looked_at = time.monotonic()

    def _is_unwanted(self, place: int) -> bool:
        return self._cancelled is not None and self._cancelled(place)

    def _cut_off(self, place: int) -> None:
        self._open.pop(place).cancel()
        pieces = self._pieces[place]
        # How many tokens a piece has only the end of the stream would have told.
        self._end(
            place, dataclasses.replace(_UNWANTED, text="".join(pieces), num_completion_tokens=len(pieces))
        )

    def _end(self, place: int, completion: Completion) -> None:
        self._done[place] = completion
        if self._on_logprobs is not None and completion.logprobs:
            self._on_logprobs(place, completion.logprobs)
        if self._on_end is not None:
            self._on_end(place, completion)
