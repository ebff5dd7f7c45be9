"""A request from its protocol to its answer: checks, images, streams. No Ray, no model.

http.py: key, size, JSON -> ChatRequest -> images -> GenerationRequest -> Backend -> answer or stream
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import random
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from anyio import CancelScope, to_thread
from fastapi.responses import JSONResponse, Response, StreamingResponse

from vlmray.config import ServeConfig
from vlmray.images.decoding import ImageError, decode_image
from vlmray.images.reading import read_image_bytes
from vlmray.schema import Completion, GenerationRequest
from vlmray.serving.adapters import AdapterCatalog
from vlmray.serving.backend import Backend, Reply
from vlmray.serving.errors import ApiError, BusyError
from vlmray.serving.monitoring import Count, Metrics
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

_NO_CACHE = {"Cache-Control": "no-cache"}
_NUM_FETCHES = 64  # downloads at a time; they wait for other machines
_NUM_DECODES = 4  # images decoded at a time; each may take max_image_pixels * 3 bytes


class Gateway:
    """One server's state: what it offers, whom it asks, and what is in progress.

    Args:
        config: The server's options.
        backend: Whoever answers.
    """

    def __init__(self, config: ServeConfig, backend: Backend) -> None:
        self.config = config
        self.backend = backend
        self.catalog = AdapterCatalog(config.model_id, config.adapter_paths(), config.adapter_dir)
        self.metrics = Metrics()
        self.created = int(time.time())
        self.draining = False
        self._adapters: list[str] = []
        # Of a client that has left, what waits for a thread is dropped, and what has one keeps it to its end.
        self._fetches = ThreadPoolExecutor(_NUM_FETCHES, thread_name_prefix="fetch")
        self._decodes = ThreadPoolExecutor(_NUM_DECODES, thread_name_prefix="decode")

    async def drain(self, timeout_s: float) -> int:
        """Take no more requests and wait for those in progress; return how many are left."""
        self.draining = True
        deadline = time.monotonic() + timeout_s
        while self.metrics.num_in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        return self.metrics.num_in_flight

    async def models(self) -> ModelList:
        """List base and adapters."""
        base = self.config.base_name
        names = await to_thread.run_sync(self.catalog.names)
        cards = [ModelCard(id=name, created=self.created, parent=base) for name in names]
        return ModelList(data=[ModelCard(id=base, created=self.created), *cards])

    def chat(self, chat: ChatRequest) -> Response:
        """Return the response to a conversation, which is worked on while it is sent."""
        return _Exchange(self, chat)

    async def read(self, chat: ChatRequest, count: Count) -> GenerationRequest:
        """Check a request, fetch its images, and write it as an engine reads it.

        Raises:
            ApiError: It cannot be answered, or not now.
        """
        if self.draining:
            raise ApiError(503, "the server is stopping", retry_s=5)
        adapter = await self._find_adapter(chat.model)
        count.model = chat.model
        return await self._to_request(chat, adapter)

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

    async def _to_request(self, chat: ChatRequest, adapter: str | None) -> GenerationRequest:
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
        loop = asyncio.get_running_loop()
        try:
            data = await loop.run_in_executor(self._fetches, read)
            check = functools.partial(decode_image, data, max_pixels=config.max_image_pixels)
            await loop.run_in_executor(self._decodes, check)
        except ImageError as error:
            raise ApiError(400, f"cannot read an image: {error}", param="messages") from error
        return data


class _Exchange(Response):
    """A conversation and its answer: counted while it lasts, and ended when the client leaves."""

    def __init__(self, gateway: Gateway, chat: ChatRequest) -> None:
        super().__init__()
        self._gateway = gateway
        self._chat = chat

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        gateway, chat = self._gateway, self._chat
        async with _while_connected(receive):
            with gateway.metrics.counted() as count:
                request = await gateway.read(chat, count)
                pieces = gateway.backend.answer(request, stream=bool(chat.stream))
                async with contextlib.aclosing(pieces):
                    answer = _Answer(chat, pieces, count, gateway.metrics)
                    await answer.start()
                    if chat.stream:
                        stream = StreamingResponse(
                            answer.events(), media_type="text/event-stream", headers=_NO_CACHE
                        )
                        await stream.stream_response(send)  # alone: it would listen for the client itself
                    else:
                        await JSONResponse((await answer.whole()).model_dump())(scope, receive, send)


@contextlib.asynccontextmanager
async def _while_connected(receive: Any) -> AsyncIterator[None]:
    """Cancel what is inside, and go on behind it, once the client has left."""

    async def cancel_when_left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        inside.cancel()

    with CancelScope() as inside:
        watch = asyncio.create_task(cancel_when_left())
        try:
            yield
        finally:
            watch.cancel()


class _Answer:
    """One answer on its way to a client."""

    def __init__(
        self, chat: ChatRequest, pieces: AsyncIterator[str | Reply], count: Count, metrics: Metrics
    ) -> None:
        self.chat = chat
        self.model = chat.model
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._pieces = pieces
        self._count = count
        self._metrics = metrics
        self._first: str | Reply | None = None
        self._started = time.monotonic()

    async def start(self) -> None:
        """Wait for the first piece: until then an error is a status, not a broken stream.

        Raises:
            ApiError: The request cannot be answered, or not now.
        """
        with self._metrics.queued.labels(self.model).track_inprogress():
            try:
                self._first = await anext(self._pieces)
            except BusyError as error:
                raise ApiError(503, str(error), retry_s=1) from error
        if isinstance(self._first, Reply):
            _check(self._first)
        if self.chat.stream:
            self._metrics.first_token.labels(self.model).observe(time.monotonic() - self._started)

    async def whole(self) -> ChatCompletion:
        """Return the answer in one piece."""
        reply = self._first
        while not isinstance(reply, Reply):
            reply = await anext(self._pieces)
        self._end(reply)
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
            self._end(piece)
        except Exception as error:  # the status is sent: all that can still be said is an event
            _LOG.warning("stream %s broke: %s", self.id, error)
            api_error = error if isinstance(error, ApiError) else ApiError(500, "the answer broke off")
            self._count.status = api_error.status
            yield _event(ErrorBody(error=api_error.detail).model_dump())
            return
        yield _event(chunks.delta(finish_reason=piece.completion.finish_reason))
        if options is not None and options.include_usage:
            yield _event(chunks.usage(_usage(piece.completion)))
        yield "data: [DONE]\n\n"

    def _end(self, reply: Reply) -> None:
        """Count the whole answer."""
        _check(reply)
        self._count.status = 200
        self._metrics.latency.labels(self.model).observe(time.monotonic() - self._started)
        self._metrics.count(self.model, reply)


def _check(reply: Reply) -> None:
    if reply.completion.error is not None:
        raise ApiError(400, f"the request cannot be answered: {reply.completion.error}")


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _usage(completion: Completion) -> Usage:
    return Usage.of(completion.num_prompt_tokens, completion.num_completion_tokens)
