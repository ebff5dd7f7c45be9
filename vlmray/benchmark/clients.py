"""Clients of a server: many requests at a time, or so many a second, each with its time.

GenerationRequest -> Clients.ask -> Timed (Completion, latency, time to first token)
requests -> Clients.keep_asking (closed loop) or Clients.ask_at_rate (open loop) -> Timed, as they come
requests -> Clients.answer_all -> Timed: no more in flight than the server takes, and none is given up
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from vlmray.engines.openai.asking import LOST_S, Asker, list_models
from vlmray.engines.openai.client import Endpoint, find_model
from vlmray.engines.openai.flow import Flow
from vlmray.engines.openai.gate import Gate, OpenGate
from vlmray.engines.openai.images import PixelBounds
from vlmray.engines.openai.shares import LocalKeeper
from vlmray.engines.openai.waiting import Waiting
from vlmray.engines.openai.wire import to_body
from vlmray.schema import Completion, GenerationRequest

_MAX_TRIES = 7  # with growing pauses: a server that has lost a replica needs a while
_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One answer and how long it took."""

    index: int
    """Place of its request."""

    completion: Completion
    latency_s: float
    """From sending the request to the end of the answer."""

    ttft_s: float | None
    """To its first text; None where the answer was not streamed, or has no text."""

    started_s: float
    """When it was sent, as `time.perf_counter` tells it."""


class Clients(AbstractAsyncContextManager["Clients"]):
    """Those who ask a server, inside one event loop.

    Args:
        url: Its address, with or without `/v1`.
        key: Key to send; None sends none worth anything.
        timeout_s: How long it may be silent, and take for one answer.
        bounds: Pixels that images are scaled to.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout_s: float = _TIMEOUT_S,
        bounds: PixelBounds | None = None,
    ) -> None:
        self.endpoint = Endpoint(url, key)
        self._timeout_s = timeout_s
        self._bounds = bounds or PixelBounds()
        self._asker = Asker(self.endpoint, OpenGate(), timeout_s, _MAX_TRIES)

    async def __aexit__(self, *_: object) -> None:
        await self.endpoint.close()

    async def check_served(self, models: Iterable[str]) -> None:
        """See that the server is there and serves models.

        Raises:
            EndpointError: It does not.
        """
        served = await list_models(self.endpoint, lost_s=LOST_S)
        for model in models:
            find_model(model, served, self.endpoint.url)

    async def ask(
        self, model: str, request: GenerationRequest, *, index: int = 0, stream: bool = False,
        asker: Asker | None = None,
    ) -> Timed:  # fmt: skip
        """Ask one model; a request that it refuses comes back as a failed completion.

        Raises:
            EndpointError: The server does not answer, after several tries.
        """
        body = to_body(request, model, self._bounds)
        started = time.perf_counter()
        first: list[float] = []

        def note(piece: str) -> None:
            if not first:
                first.append(time.perf_counter() - started)

        completion = await (asker or self._asker).ask(body, note if stream else None)
        return Timed(
            index=index, completion=completion, latency_s=time.perf_counter() - started,
            ttft_s=first[0] if first else None, started_s=started,
        )  # fmt: skip

    async def answer_all(
        self, model: str, requests: Iterable[GenerationRequest], most: int, say: Callable[[str], None]
    ) -> AsyncIterator[Timed]:
        """Ask with as many requests in flight as the server takes; yield answers as they come.

        Args:
            model: The name by which the server knows it.
            requests: Taken one by one, when there is room for one.
            most: The most in flight.
            say: Takes a line about what the server keeps everybody waiting for.
        """
        waiting = Waiting(self.endpoint.url, self._timeout_s, say)
        gate = Gate(LocalKeeper(Flow(most)), waiting.look)
        asker = Asker(self.endpoint, gate, self._timeout_s)
        try:
            async for timed in self.keep_asking(model, requests, most, asker=asker):
                yield timed
        finally:
            await gate.close()

    async def keep_asking(
        self, model: str, requests: Iterable[GenerationRequest], concurrency: int, *, stream: bool = False,
        asker: Asker | None = None,
    ) -> AsyncIterator[Timed]:  # fmt: skip
        """Ask with a fixed number of requests in flight (closed loop); yield answers as they come.

        The requests are taken from the iterable one by one, when there is room for one.
        """
        numbered = enumerate(requests)

        def start(count: int) -> Iterator[asyncio.Task[Timed]]:
            for index, request in _take(numbered, count):
                yield self._start(model, request, index, stream, asker)

        flying = set(start(concurrency))
        async for timed in _as_completed(flying):
            flying.update(start(1))
            yield timed

    async def ask_at_rate(
        self, model: str, requests: Sequence[GenerationRequest], rate: float, *, seed: int = 0
    ) -> AsyncIterator[Timed]:
        """Send streams at random times, `rate` a second on average, whether answered or not (open loop).

        The pauses are exponential, so arrivals are those of many people who do not know of each other.
        """
        pauses = random.Random(seed)
        start = time.perf_counter()
        flying: set[asyncio.Task[Timed]] = set()
        due = start
        for index, request in enumerate(requests):
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            flying.add(self._start(model, request, index, True))
            due += pauses.expovariate(rate)
        async for timed in _as_completed(flying):
            yield timed

    def _start(
        self, model: str, request: GenerationRequest, index: int, stream: bool, asker: Asker | None = None
    ) -> asyncio.Task[Timed]:
        return asyncio.create_task(self.ask(model, request, index=index, stream=stream, asker=asker))


def _take(numbered: Iterator[tuple[int, GenerationRequest]], count: int) -> list[Any]:
    return [pair for _, pair in zip(range(count), numbered, strict=False)]


async def _as_completed(flying: set[asyncio.Task[Timed]]) -> AsyncIterator[Timed]:
    """Yield results of a set of tasks that may grow; if one fails, none goes on."""
    try:
        while flying:
            done, _ = await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
            flying -= done
            for task in done:
                yield task.result()
    finally:
        for task in flying:
            task.cancel()
