"""One server, asked patiently: again after refusals and losses, with no more in flight than it takes."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable
from typing import Any

from vlmray.engines.base import failed_completion
from vlmray.engines.openai.client import Endpoint, EndpointError, UnansweredError
from vlmray.engines.openai.gate import Gate, OpenGate, Place
from vlmray.engines.openai.shares import State
from vlmray.engines.openai.waiting import Waiting
from vlmray.errors import RunError
from vlmray.schema import Completion

LOST_S = 2.0
"""How long to wait before a run for a server that says nothing: it may be a mistake."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 30.0
_MAX_DOUBLINGS = 10
_MAX_FAILURES = 5
"""Times that a server may have an accident (500) with one request before it is the request's fault."""


async def list_models(endpoint: Endpoint, *, lost_s: float) -> dict[str, int | None]:
    """Return what `Endpoint.models` does, however long the server has too much to do.

    Args:
        endpoint: The server.
        lost_s: How long to wait for one that says nothing.

    Raises:
        EndpointError: It does not answer, or refuses to.
    """
    waiting = Waiting(endpoint.url, lost_s)
    num_tries, started = 0, time.monotonic()
    heard_at = started
    while True:
        try:
            return await endpoint.models()
        except UnansweredError as error:
            now = time.monotonic()
            if error.kind != "lost":
                heard_at = now
            elif now - heard_at >= lost_s:
                raise EndpointError(str(error)) from error
            num_tries += 1
            pause_s = max(error.retry_after_s, _pause_s(num_tries))
        waiting.look(
            State(num_wanted=1, pause_s=pause_s, silent_s=now - heard_at, unanswered_s=now - started)
        )
        await asyncio.sleep(pause_s)


def _pause_s(num_tries: int) -> float:
    """Return how long to leave a request be; not as long as others that failed at the same time."""
    longest_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(num_tries, _MAX_DOUBLINGS))
    return random.uniform(longest_s / 2, longest_s)


class Asker:
    """Asks until there is an answer.

    Args:
        endpoint: The server.
        gate: Lets requests in.
        timeout_s: How long the server may be silent, and take for one answer.
        max_tries: Times that a request is asked before the server is given up.
    """

    def __init__(
        self, endpoint: Endpoint, gate: Gate | OpenGate, timeout_s: float, max_tries: float = math.inf
    ) -> None:
        self._endpoint = endpoint
        self._gate = gate
        self._timeout_s = timeout_s
        self._max_tries = max_tries

    async def ask(self, body: dict[str, Any], on_text: Callable[[str], None] | None = None) -> Completion:
        """Ask as often as it takes.

        Args:
            body: As `to_body` returns it.
            on_text: Called with each piece of text as it comes, with none twice.

        Raises:
            EndpointError: The server says nothing at all any more, or will not answer any request.
        """
        with self._gate.wanted():
            return await self._ask_patiently(body, Told(on_text) if on_text else None)

    async def _ask_patiently(self, body: dict[str, Any], told: Told | None) -> Completion:
        num_tries = num_failures = 0
        while True:
            async with self._gate.place(again=num_tries > 0) as place:
                try:
                    return await self._ask_once(place, body, told, num_tries)
                except UnansweredError as error:
                    place.end(error.kind, retry_after_s=error.retry_after_s)
                    num_failures += error.kind == "failed"
                    reason = error
            num_tries += 1
            self._check(reason, num_tries)
            if num_failures >= _MAX_FAILURES:
                return failed_completion(RunError(f"asked {num_failures} times: {reason}"))
            await asyncio.sleep(_pause_s(num_tries))

    async def _ask_once(
        self, place: Place, body: dict[str, Any], told: Told | None, num_tries: int
    ) -> Completion:
        # What takes much longer than all others may be stuck; in case it is not it gets longer each time.
        patience_s = self._gate.allowance.state.patience_s * 2 ** min(num_tries, _MAX_DOUBLINGS)
        limit_s = min(patience_s, self._timeout_s)
        try:
            async with asyncio.timeout(limit_s):
                completion = await self._endpoint.ask(body, told.begin() if told else None)
        except TimeoutError as error:
            raise UnansweredError(f"no answer within {limit_s:.0f} s", "lost") from error
        if completion.error is None:
            place.end("answered", num_tokens=(completion.num_prompt_tokens, completion.num_completion_tokens))
        else:
            place.end("failed")
        return completion

    def _check(self, error: UnansweredError, num_tries: int) -> None:
        """Give up on a server that has been silent for as long as it may be, or was asked often enough."""
        if num_tries >= self._max_tries:
            raise EndpointError(f"{self._endpoint.url} does not answer: {error}") from error
        silent_s = self._gate.allowance.state.silent_s
        if error.kind == "lost" and silent_s >= self._timeout_s:
            raise EndpointError(
                f"{self._endpoint.url} has not answered for {silent_s:.0f} s ({error}); see that it runs, or "
                "raise --endpoint_timeout_s"
            ) from error


class Told:
    """What a reader was told of an answer, over several tries.

    Args:
        on_text: The reader.
    """

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self._on_text = on_text
        self._told = ""
        self._text = ""

    def begin(self) -> Callable[[str], None]:
        """Begin another try, and return what is to be called with its pieces."""
        self._text = ""
        return self._add

    def _add(self, piece: str) -> None:
        self._text += piece
        if not self._text.startswith(self._told[: len(self._text)]):
            raise UnansweredError("the stream broke, and the answer now begins otherwise", "failed")
        new = self._text[len(self._told) :]
        if new:
            self._told += new
            self._on_text(new)
