"""A request from its protocol to its answer: checks, images, streams. No Ray, no model.

http.py: key, size, JSON -> ChatRequest -> images -> GenerationRequest -> Backend -> answer or stream
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import hmac
import json
import logging
import random
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi.responses import JSONResponse, Response, StreamingResponse

from vlmray.config import ServeConfig
from vlmray.images.decoding import ImageError, decode_image
from vlmray.images.reading import read_image_bytes
from vlmray.schema import Completion, GenerationRequest
from vlmray.serving.adapters import AdapterCatalog
from vlmray.serving.backend import Backend, Reply
from vlmray.serving.errors import ApiError, BusyError
from vlmray.serving.monitoring import Metrics
from vlmray.serving.protocol import (
    AnswerMessage,
    ChatCompletion,
    ChatRequest,
    Choice,
    Chunks,
    ErrorBody,
    ModelCard,
    ModelList,
    Usage,
    check_supported,
    count_chars,
    image_sources,
    to_messages,
)

_LOG = logging.getLogger(__name__)

_CLIENT_LEFT = 499  # no client sees it; it is what others count such requests as
_NUM_FETCHES = 64  # downloads at a time; they wait for other machines
_NUM_DECODES = 4  # images decoded at a time; each may take max_image_pixels * 3 bytes


class Gateway:
    """One server's state: what it offers, whom it asks, and what is in progress.

    Args:
        config: The server's options.
        backend: Whoever answers.
        key_digest: SHA-256 of the API key; None lets everybody in.
    """

    def __init__(self, config: ServeConfig, backend: Backend, key_digest: bytes | None = None) -> None:
        self.config = config
        self.backend = backend
        self.catalog = AdapterCatalog(config.model_id, config.adapter_paths(), config.adapter_dir)
        self.metrics = Metrics()
        self.created = int(time.time())
        self.num_in_flight = 0
        self.metrics.in_flight.set_function(lambda: self.num_in_flight)
        self.draining = False
        self._adapters: list[str] = []
        self._key_digest = key_digest
        self._fetches, self._decodes = CapacityLimiter(_NUM_FETCHES), CapacityLimiter(_NUM_DECODES)

    async def drain(self, timeout_s: float) -> int:
        """Take no more requests and wait for those in progress; return how many are left."""
        self.draining = True
        deadline = time.monotonic() + timeout_s
        while self.num_in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        return self.num_in_flight

    def admits(self, authorization: bytes) -> bool:
        """Tell whether a header holds the API key, in time that does not depend on what it holds."""
        if self._key_digest is None:
            return True
        scheme, _, key = authorization.partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        return hmac.compare_digest(given, self._key_digest) and scheme.lower() == b"bearer"

    async def models(self) -> ModelList:
        """List base and adapters."""
        base = self.config.base_name
        names = await to_thread.run_sync(self.catalog.names)
        cards = [ModelCard(id=name, created=self.created, parent=base) for name in names]
        return ModelList(data=[ModelCard(id=base, created=self.created), *cards])

    async def chat(self, chat: ChatRequest) -> Response:
        """Answer a conversation, at once or as a stream."""
        if self.draining:
            self.metrics.requests.labels("", 503).inc()
            raise ApiError(503, "the server is stopping", retry_s=5)
        known = False
        status = 500
        self.num_in_flight += 1
        try:
            adapter = await self._find_adapter(chat.model)
            known = True
            request = await self._read(chat, adapter)
            answer = _Answer(self, chat, request)
            await answer.start()
            status = 200
        except ApiError as error:
            status = error.status
            raise
        finally:
            if status != 200:
                self.num_in_flight -= 1
                # A client may not make up labels: each one is kept for good.
                self.metrics.requests.labels(chat.model if known else "", status).inc()
        if chat.stream:
            return _Stream(answer)
        return JSONResponse((await answer.whole()).model_dump())

    async def _find_adapter(self, name: str) -> str | None:
        if name == self.config.base_name:
            return None
        if name not in self._adapters:  # listing may ask an object store: only for new names
            self._adapters = await to_thread.run_sync(self.catalog.names)
        if name not in self._adapters:
            known = ", ".join([self.config.base_name, *self._adapters][:20])
            message = f"the model {name[:80]!r} does not exist; known: {known}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return name

    async def _read(self, chat: ChatRequest, adapter: str | None) -> GenerationRequest:
        """Check a request, fetch its images, and write it as an engine reads it."""
        config = self.config
        try:
            check_supported(chat)
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        limit = chat.limit or config.max_new_tokens
        if limit > config.max_new_tokens_limit:
            message = f"max_tokens is {limit}; at most {config.max_new_tokens_limit} are allowed"
            raise ApiError(400, message, param="max_tokens")
        num_chars = count_chars(chat)
        if num_chars > config.max_prompt_chars:
            raise ApiError(400, f"{num_chars} characters; at most {config.max_prompt_chars} are allowed")
        sources = image_sources(chat)
        if len(sources) > config.max_images:
            raise ApiError(400, f"{len(sources)} images; at most {config.max_images} are allowed")
        images: list[Any] = await asyncio.gather(*map(self._fetch, sources))
        return GenerationRequest(
            # Sampling depends on id and seed: the same request with the same seed is answered the same.
            request_id="chat",
            messages=to_messages(chat),
            images=images,
            max_new_tokens=limit,
            temperature=chat.temperature or 0.0,
            top_p=chat.top_p or 1.0,
            stop=chat.stop_texts,
            seed=random.getrandbits(32) if chat.seed is None else chat.seed,
            adapter=adapter,
        )

    async def _fetch(self, source: str) -> bytes:
        """Return the bytes of an image, which can be decoded."""
        config = self.config
        if not source.lower().startswith(("data:", "http://", "https://")):
            raise ApiError(400, "an image_url is neither a data URI nor an http(s) URL", param="messages")
        read = functools.partial(
            read_image_bytes, source, max_bytes=config.max_body_bytes, timeout_s=config.image_timeout_s,
            public_only=not config.allow_private_image_urls,
        )  # fmt: skip
        try:
            data = await to_thread.run_sync(read, limiter=self._fetches)
            check = functools.partial(decode_image, data, max_pixels=config.max_image_pixels)
            await to_thread.run_sync(check, limiter=self._decodes)
        except ImageError as error:
            raise ApiError(400, f"cannot read an image: {error}", param="messages") from error
        return data


class _Answer:
    """One answer on its way to a client; counts itself."""

    def __init__(self, gateway: Gateway, chat: ChatRequest, request: GenerationRequest) -> None:
        self.gateway = gateway
        self.chat = chat
        self.model = chat.model
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._pieces = gateway.backend.answer(request, stream=bool(chat.stream))
        self._first: str | Reply | None = None
        self._started = time.monotonic()
        self._finished = False

    async def start(self) -> None:
        """Wait for the first piece: until then an error is a status, not a broken stream.

        Raises:
            ApiError: The request cannot be answered, or not now.
        """
        metrics = self.gateway.metrics
        with metrics.queued.labels(self.model).track_inprogress():
            try:
                self._first = await anext(self._pieces)
            except BusyError as error:
                raise ApiError(503, str(error), retry_s=1) from error
        if isinstance(self._first, Reply):
            self._check(self._first)
        if self.chat.stream:
            metrics.first_token.labels(self.model).observe(time.monotonic() - self._started)

    async def whole(self) -> ChatCompletion:
        """Return the answer in one piece."""
        reply = self._first
        try:
            while not isinstance(reply, Reply):
                reply = await anext(self._pieces)
            self._check(reply)
        except BaseException as error:
            self.finish(error.status if isinstance(error, ApiError) else 500)
            raise
        self.finish(200, reply)
        completion = reply.completion
        return ChatCompletion(
            id=self.id,
            created=int(time.time()),
            model=self.model,
            choices=[
                Choice(
                    message=AnswerMessage(content=completion.text),
                    finish_reason="length" if completion.finish_reason == "length" else "stop",
                )
            ],
            usage=_usage(completion),
        )

    async def events(self) -> AsyncIterator[str]:
        """Yield the answer as server-sent events."""
        chunks = Chunks(self.id, self.model)
        options = self.chat.stream_options
        yield _event(chunks.delta(role="assistant", content=""))
        piece = self._first
        try:
            while not isinstance(piece, Reply):
                if piece:
                    yield _event(chunks.delta(content=piece))
                piece = await anext(self._pieces)
            self._check(piece)
        except Exception as error:  # the status is sent: all that can still be said is an event
            _LOG.warning("stream %s broke: %s", self.id, error)
            api_error = error if isinstance(error, ApiError) else ApiError(500, "the answer broke off")
            self.finish(api_error.status)
            yield _event(ErrorBody(error=api_error.detail).model_dump())
            return
        yield _event(chunks.delta(finish_reason=piece.completion.finish_reason))
        if options is not None and options.include_usage:
            yield _event(chunks.usage(_usage(piece.completion)))
        self.finish(200, piece)
        yield "data: [DONE]\n\n"

    def finish(self, status: int, reply: Reply | None = None) -> None:
        """Count the answer; only the first call counts."""
        if self._finished:
            return
        self._finished = True
        self.gateway.num_in_flight -= 1
        metrics = self.gateway.metrics
        metrics.requests.labels(self.model, status).inc()
        metrics.latency.labels(self.model).observe(time.monotonic() - self._started)
        if reply is not None:
            metrics.count(self.model, reply)

    def _check(self, reply: Reply) -> None:
        if reply.completion.error is not None:
            raise ApiError(400, f"the request cannot be answered: {reply.completion.error}")


class _Stream(StreamingResponse):
    """A streamed answer that is counted even if the client leaves before the first event."""

    def __init__(self, answer: _Answer) -> None:
        super().__init__(
            answer.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.finish(_CLIENT_LEFT)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _usage(completion: Completion) -> Usage:
    return Usage.of(completion.num_prompt_tokens, completion.num_completion_tokens)
