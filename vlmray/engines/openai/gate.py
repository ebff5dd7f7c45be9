"""Where requests wait until one more may be in flight; for use inside one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from typing import Literal

from vlmray.engines.openai.flow import Outcome
from vlmray.engines.openai.shares import Allowance, Keeper, Report, State

_PERIOD_S = 1.0
"""Between reports while something is wanted and nothing happens."""


class Place:
    """A request in flight."""

    def __init__(self, level: int) -> None:
        self._level = level
        self._since = time.monotonic()
        self.outcome: Outcome | None = None
        """What became of it; None says nothing, as of one that nobody wanted any more."""

    def end(
        self,
        kind: Literal["answered", "refused", "lost", "failed"],
        *,
        num_tokens: tuple[int, int] = (0, 0),
        retry_after_s: float = 0.0,
    ) -> None:
        """Say what became of it."""
        self.outcome = Outcome(
            kind=kind,
            latency_s=time.monotonic() - self._since,
            level=self._level,
            num_tokens=num_tokens,
            retry_after_s=retry_after_s,
        )


class OpenGate:
    """Lets everybody in: what is measured is how a server takes a load that was said."""

    allowance = Allowance(places=0, state=State())

    @contextlib.asynccontextmanager
    async def place(self, *, again: bool = False) -> AsyncIterator[Place]:
        """Have a place at once."""
        yield Place(1)

    def wanted(self) -> AbstractContextManager[None]:
        """Nobody needs to know."""
        return contextlib.nullcontext()


class Gate:
    """Lets requests of this process in.

    Args:
        keeper: Has the limit.
        watch: Told how it goes, again and again.
    """

    def __init__(self, keeper: Keeper, watch: Callable[[State], None] = lambda state: None) -> None:
        self._watch = watch
        self.allowance = Allowance(places=0, state=State())
        self.num_in_flight = self.num_wanted = 0
        self._keeper = keeper
        self._name = uuid.uuid4().hex
        self._waiting: deque[asyncio.Future[int]] = deque()
        self._outcomes: list[Outcome] = []
        self._changed = asyncio.Event()
        self._opens_at = 0.0
        self._reports = asyncio.create_task(self._keep_reporting())

    @contextlib.asynccontextmanager
    async def place(self, *, again: bool = False) -> AsyncIterator[Place]:
        """Wait for a place in flight and have it; those who come again come first."""
        turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        (self._waiting.appendleft if again else self._waiting.append)(turn)
        self._let_in()
        self._changed.set()
        try:
            place = Place(await turn)
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._leave()
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise
        try:
            yield place
        finally:
            self._leave(place.outcome)

    @contextlib.contextmanager
    def wanted(self) -> Iterator[None]:
        """Want an answer, between two tries too."""
        self.num_wanted += 1
        try:
            yield
        finally:
            self.num_wanted -= 1

    async def close(self) -> None:
        """Report no more."""
        self._reports.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reports

    def _leave(self, outcome: Outcome | None = None) -> None:
        self.num_in_flight -= 1
        if outcome is not None:
            self._outcomes.append(outcome)
        if outcome is None or outcome.kind == "answered":
            self._let_in()  # else the keeper is heard first
        self._changed.set()

    def _let_in(self) -> None:
        while (
            self._waiting
            and self.num_in_flight < self.allowance.places
            and time.monotonic() >= self._opens_at
        ):
            turn = self._waiting.popleft()
            if not turn.cancelled():  # who waited has left, and was not told so yet
                self.num_in_flight += 1
                turn.set_result(self.num_in_flight)

    async def _keep_reporting(self) -> None:
        while True:
            with contextlib.suppress(
                TimeoutError
            ):  # `wait_for` loses a cancellation that comes with an event
                async with asyncio.timeout(self._rest_s()):
                    await self._changed.wait()
            self._changed.clear()
            outcomes, self._outcomes = self._outcomes, []
            self.allowance = await self._keeper.report(
                Report(
                    holder=self._name,
                    num_in_flight=self.num_in_flight,
                    num_wanted=self.num_wanted,
                    outcomes=outcomes,
                )
            )
            self._opens_at = time.monotonic() + self.allowance.state.pause_s
            self._let_in()
            self._watch(self.allowance.state)
            await asyncio.sleep(self._keeper.pace_s)

    def _rest_s(self) -> float | None:
        """Return how long to wait before a report of no news; None: until there are some."""
        if not self.num_wanted:
            return None
        pause_s = self._opens_at - time.monotonic()
        return min(_PERIOD_S, pause_s) if pause_s > 0 else _PERIOD_S
