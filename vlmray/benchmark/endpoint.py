"""An OpenAI-compatible server as something to ask: one request, many at a time, or so many a second.

GenerationRequest -> Endpoint.ask -> Timed (Completion, latency, time to first token)
requests -> Endpoint.keep_asking (closed loop) or Endpoint.ask_at_rate (open loop) -> Timed, as they come
"""

from __future__ import annotations

import asyncio
import base64
import logging
import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import openai

from vlmray.engines.base import failed_completion
from vlmray.errors import RunError, one_line
from vlmray.schema import Completion, GenerationRequest

for _name in ("httpx", "httpx2"):  # which the client is made of: a line for every request
    logging.getLogger(_name).setLevel(logging.WARNING)

_MAX_RETRIES = 6  # with growing pauses: a server that has lost a replica needs a while
_TIMEOUT_S = 600.0


class EndpointError(RunError):
    """The server does not answer, or not as it should."""


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


class Endpoint(AbstractAsyncContextManager["Endpoint"]):
    """A server, for use inside one event loop.

    Args:
        url: Its address, with or without `/v1`.
        api_key: Key to send; None sends none worth anything.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._client = openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=api_key or "none", max_retries=_MAX_RETRIES, timeout=_TIMEOUT_S
        )

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def models(self) -> list[str]:
        """Return the names that models are served by.

        Raises:
            EndpointError: No server answers, or it wants another key.
        """
        try:
            page = await self._client.with_options(max_retries=1, timeout=30).models.list()
        except openai.OpenAIError as error:
            raise EndpointError(f"{self.url} does not list its models: {_say(error)}") from error
        return [model.id for model in page.data]

    async def ask(
        self, model: str, request: GenerationRequest, *, index: int = 0, stream: bool = False
    ) -> Timed:
        """Ask one model; a request that it refuses comes back as a failed completion.

        Raises:
            EndpointError: The server does not answer, after several tries.
        """
        options: dict[str, Any] = {
            "model": model, "messages": _to_openai(request), "max_tokens": request.max_new_tokens,
            "temperature": request.temperature, "top_p": request.top_p, "seed": request.seed,
            "extra_body": _extra_settings(request),
        }  # fmt: skip
        if request.stop:
            options["stop"] = list(request.stop)
        started = time.perf_counter()
        ttft_s = None
        try:
            if stream:
                completion, ttft_s = await self._ask_stream(options, started)
            else:
                found = await self._client.chat.completions.create(**options)
                (choice,) = found.choices
                completion = _completion(choice.message.content, choice.finish_reason, found.usage)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            completion = failed_completion(ValueError(_say(error)))
        except openai.OpenAIError as error:
            raise EndpointError(f"{self.url} does not answer: {_say(error)}") from error
        return Timed(
            index=index, completion=completion, latency_s=time.perf_counter() - started, ttft_s=ttft_s,
            started_s=started,
        )  # fmt: skip

    async def keep_asking(
        self, model: str, requests: Iterable[GenerationRequest], concurrency: int, *, stream: bool = False
    ) -> AsyncIterator[Timed]:
        """Ask with a fixed number of requests in flight (closed loop); yield answers as they come.

        The requests are taken from the iterable one by one, when there is room for one.
        """
        numbered = enumerate(requests)
        flying = {
            self._start(model, request, index, stream) for index, request in _take(numbered, concurrency)
        }
        async for timed in _as_completed(flying):
            flying.update(self._start(model, request, index, stream) for index, request in _take(numbered, 1))
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

    def _start(self, model: str, request: GenerationRequest, index: int, stream: bool) -> asyncio.Task[Timed]:
        return asyncio.create_task(self.ask(model, request, index=index, stream=stream))

    async def _ask_stream(self, options: dict[str, Any], started: float) -> tuple[Completion, float | None]:
        """Read a stream to its end; return the whole and the seconds to its first text."""
        chunks = await self._client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
        ttft_s, text, reason, usage = None, "", None, None
        async for chunk in chunks:
            for choice in chunk.choices:
                if choice.delta.content and ttft_s is None:
                    ttft_s = time.perf_counter() - started
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
            usage = chunk.usage or usage
        return _completion(text, reason, usage), ttft_s


def _extra_settings(request: GenerationRequest) -> dict[str, Any]:
    """Return what is asked for beside the usual, under vLLM's names: not every server knows them."""
    names = ("top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    found = {name: getattr(request, name) for name in names} | {"min_tokens": request.min_new_tokens}
    return {name: value for name, value in found.items() if value}


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


def _to_openai(request: GenerationRequest) -> list[dict[str, Any]]:
    """Put the images, as data URIs, where the messages have placeholders."""
    images = iter(request.images)

    def part_of(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        data = next(images)
        if not isinstance(data, bytes):
            raise TypeError(f"an image of a request is a {type(data).__name__}; a server needs encoded bytes")
        url = f"data:image;base64,{base64.b64encode(data).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}

    return [{**message, "content": list(map(part_of, message["content"]))} for message in request.messages]


def _completion(text: str | None, reason: str | None, usage: Any) -> Completion:
    return Completion(
        text=text or "",
        prompt="",  # the server's template writes it
        num_prompt_tokens=usage.prompt_tokens if usage else 0,
        num_completion_tokens=usage.completion_tokens if usage else 0,
        finish_reason="length" if reason == "length" else "stop",
    )


def _say(error: openai.OpenAIError) -> str:
    """Name what went wrong in a line: the server's own words where there are some."""
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    cause = error.__cause__
    return one_line(message or (f"{error} ({cause})" if cause else error), 500)
