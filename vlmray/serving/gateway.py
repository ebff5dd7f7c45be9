"""A request from its protocol to its answer: checks, images, streams. No Ray, no model.

http/: key, size, JSON -> ChatRequest -> images -> GenerationRequest -> Backend -> answer or stream
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
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

from anyio import CancelScope, to_thread
from fastapi.responses import JSONResponse, Response, StreamingResponse

from vlmray.config import ServeConfig
from vlmray.images.decoding import ImageError, decode_image
from vlmray.images.reading import read_image_bytes
from vlmray.protocol.answers import (
    ChatCompletion,
    Choice,
    Chunks,
    ErrorBody,
    ModelCard,
    ModelList,
    Usage,
    call_id,
)
from vlmray.protocol.errors import ApiError
from vlmray.protocol.request import ChatRequest, count_chars, image_sources, sampling, to_messages
from vlmray.protocol.tools import CallStream
from vlmray.schema import Completion, GenerationRequest
from vlmray.serving.adapters import AdapterCatalog
from vlmray.serving.backend import Backend, Piece, Reply
from vlmray.serving.errors import BusyError
from vlmray.serving.monitoring import Count, Figures, Metrics, exposition
from vlmray.serving.pace import Pace

_LOG = logging.getLogger(__name__)

_NO_CACHE = {"Cache-Control": "no-cache"}
_NUM_FETCHES = 64  # downloads at a time; they wait for other machines
_NUM_DECODES = 4  # images decoded at a time; each may take max_image_pixels * 3 bytes


class Gateway:
    """What a server offers, whom it asks, and what is in progress here: others stand beside it.

    Args:
        config: The server's options.
        backend: Whoever answers.
        name: What it is called in the metrics of several.
        created: When the server was made, in seconds of the epoch; default: now.
        all_figures: Asks all gateways, this one too, what they have counted; default: this one is alone.
    """

    def __init__(
        self, config: ServeConfig, backend: Backend, *, name: str = "", created: int | None = None,
        all_figures: Callable[[], Awaitable[Sequence[Figures]]] | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.config = config
        self.backend = backend
        self.catalog = AdapterCatalog(config.model_id, config.adapter_paths(), config.adapter_dir)
        self.metrics = Metrics()
        self.pace = Pace()
        self.created = created or int(time.time())
        self.draining = False
        self._all_figures = all_figures
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

    def figures(self) -> Figures:
        """Return what was counted here."""
        return Figures(self.name, [*self.metrics.registry.collect()])

    async def exposition(self) -> bytes:
        """Write what all gateways have counted, for Prometheus."""
        return exposition(await self._all_figures() if self._all_figures else [self.figures()])

    async def check_ready(self) -> None:
        """Raise an `ApiError` as long as requests are not answered."""
        if self.draining:
            raise ApiError(503, "the server is stopping", retry_s=5)
        if not await self.backend.is_ready():
            raise ApiError(503, "no model can answer yet", retry_s=2)

    async def models(self) -> ModelList:
        """List base and adapters."""
        base = self.config.base_name
        names = await to_thread.run_sync(self.catalog.names)
        about: dict[str, Any] = {
            "created": self.created, "max_model_len": await self.backend.max_model_len()
        }  # fmt: skip
        cards = [ModelCard(id=name, root=self.catalog.path(name), parent=base, **about) for name in names]
        return ModelList(data=[ModelCard(id=base, root=self.config.model_id, **about), *cards])

    async def model(self, name: str) -> ModelCard:
        """Describe one model; slashes at the ends of its name do not count, as paths come without.

        Raises:
            ApiError: There is none of that name.
        """
        cards = (await self.models()).data
        found = next((card for card in cards if card.id.strip("/") == name.strip("/")), None)
        return found or _refuse_model(name, [card.id for card in cards])

    def chat(self, chat: ChatRequest, count: Count) -> Response:
        """Return the response to a conversation, which is worked on while it is sent."""
        return _Exchange(self, chat, count)

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
        name = name.removeprefix(f"{self.config.base_name}:")
        if name not in self._adapters:  # listing may ask an object store: only for new names
            self._adapters = await to_thread.run_sync(self.catalog.names)
        if name not in self._adapters:
            _refuse_model(name, [self.config.base_name, *self._adapters])
        return name

    async def _to_request(self, chat: ChatRequest, adapter: str | None) -> GenerationRequest:
        config = self.config
        limit = chat.limit or config.max_new_tokens
        if limit > config.max_new_tokens_limit:
            message = f"max_tokens is {limit}; at most {config.max_new_tokens_limit} are allowed"
            raise ApiError(400, message, param="max_tokens")
        if chat.min_tokens and chat.min_tokens > limit:
            message = f"min_tokens is {chat.min_tokens}; max_tokens is {limit}"
            raise ApiError(400, message, param="min_tokens")
        num_chars = count_chars(chat)
        if num_chars > config.max_prompt_chars:
            message = (
                f"the messages have {num_chars} characters; at most {config.max_prompt_chars} are allowed"
            )
            raise ApiError(400, message, param="messages")
        sources = image_sources(chat)
        if len(sources) > config.max_images:
            message = f"the messages have {len(sources)} images; at most {config.max_images} are allowed"
            raise ApiError(400, message, param="messages")
        images: list[Any] = await asyncio.gather(*(self._fetch(*item) for item in sources.items()))
        return GenerationRequest(
            # Sampling depends on id and seed: the same request with the same seed is answered the same.
            request_id="chat",
            messages=to_messages(chat),
            images=images,
            max_new_tokens=limit,
            stop=chat.stop_texts,
            stop_token_ids=tuple(chat.stop_token_ids or ()),
            chat_template_kwargs={**(config.chat_template_kwargs or {}), **chat.template_kwargs},
            seed=random.getrandbits(32) if chat.seed is None else chat.seed,
            adapter=adapter,
            **sampling(chat),
        )

    async def _fetch(self, place: str, source: str) -> bytes:
        """Return the bytes of an image, which can be decoded."""
        config = self.config
        if not source.lower().startswith(("data:", "http://", "https://")):
            raise ApiError(400, f"{place}.url is neither a data URI nor an http(s) URL", param=place)
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
            raise ApiError(400, f"{place}: cannot read an image: {error}", param=place) from error
        return data


class _Exchange(Response):
    """A conversation and its answer: counted while it lasts, and ended when the client leaves."""

    def __init__(self, gateway: Gateway, chat: ChatRequest, count: Count) -> None:
        super().__init__()
        self._gateway = gateway
        self._chat = chat
        self._count = count

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        gateway, chat, count = self._gateway, self._chat, self._count
        async with _while_connected(receive, count):
            with gateway.metrics.in_progress():
                request = await gateway.read(chat, count)
                pieces = gateway.backend.answer(request, stream=bool(chat.stream))
                async with contextlib.aclosing(pieces):
                    answer = _Answer(gateway, chat, pieces, count)
                    await answer.start()
                    if chat.stream:
                        stream = StreamingResponse(
                            answer.events(), media_type="text/event-stream", headers=_NO_CACHE
                        )
                        await stream.stream_response(send)  # alone: it would listen for the client itself
                    else:
                        await JSONResponse((await answer.whole()).model_dump())(scope, receive, send)


@contextlib.asynccontextmanager
async def _while_connected(receive: Any, count: Count) -> AsyncIterator[None]:
    """Cancel what is inside, and go on behind it, once the client has left."""

    async def cancel_when_left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        count.leave()
        inside.cancel()

    with CancelScope() as inside:
        watch = asyncio.create_task(cancel_when_left())
        try:
            yield
        except Exception:
            if not inside.cancel_called:  # else it is what a call says that was cut off
                raise
        finally:
            watch.cancel()


class _Answer:
    """One answer on its way to a client."""

    def __init__(
        self, gateway: Gateway, chat: ChatRequest, pieces: AsyncIterator[str | Piece | Reply], count: Count
    ) -> None:
        self.chat = chat
        self.model = chat.model
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._pieces = pieces
        self._count = count
        self._metrics = gateway.metrics
        self._pace = gateway.pace
        self._first: str | Piece | Reply | None = None
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
                raise ApiError(503, str(error), retry_s=self._pace.turn_away()) from error
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
                Choice.of(
                    self.id,
                    completion.text,
                    is_cut=completion.finish_reason == "length",
                    is_call=bool(self.chat.forced_functions),
                    logprobs=completion.logprobs,
                )
            ],
            usage=_usage(completion),
        )

    async def events(self) -> AsyncIterator[str]:
        """Yield the answer as server-sent events."""
        chunks = Chunks(self.id, self.model)
        options = self.chat.stream_options
        call = CallStream(call_id(self.id)) if self.chat.forced_functions else None
        yield _event(chunks.delta(role="assistant", content=None if call else ""))
        piece = self._first
        try:
            while not isinstance(piece, Reply):
                text, logprobs = (piece.text, piece.logprobs) if isinstance(piece, Piece) else (piece, ())
                delta = call.push(text or "") if call else {"content": text or ""}
                if (text and delta) or logprobs:
                    yield _event(chunks.delta(logprobs=logprobs, **(delta or {})))
                piece = await anext(self._pieces)
            self._end(piece)
        except Exception as error:  # the status is sent: all that can still be said is an event
            _LOG.warning("stream %s broke: %s", self.id, error)
            api_error = error if isinstance(error, ApiError) else ApiError(500, "the answer broke off")
            self._count.status = api_error.status
            yield _event(ErrorBody(error=api_error.detail).model_dump())
            return
        reason: str = piece.completion.finish_reason
        if call:
            if delta := call.end(piece.completion.text):
                yield _event(chunks.delta(**delta))
            reason = "tool_calls" if reason == "stop" else reason
        yield _event(chunks.delta(finish_reason=reason))
        if options is not None and options.include_usage:
            yield _event(chunks.usage(_usage(piece.completion)))
        yield "data: [DONE]\n\n"

    def _end(self, reply: Reply) -> None:
        """Count the whole answer."""
        _check(reply)
        self._count.status = 200
        self._pace.answered(self._started)
        self._metrics.latency.labels(self.model).observe(time.monotonic() - self._started)
        self._metrics.count(self.model, reply)


def _check(reply: Reply) -> None:
    completion = reply.completion
    if completion.error is None:
        return
    message = completion.error.removeprefix("ValueError: ").removeprefix("ContextLengthError: ")
    code = completion.error_code
    raise ApiError(
        400, f"the request cannot be answered: {message}", param="messages" if code else None, code=code
    )


def _refuse_model(name: str, known: Sequence[str]) -> NoReturn:
    message = f"the model {name[:80]!r} does not exist; known: {', '.join(known[:20])}"
    raise ApiError(404, message, param="model", code="model_not_found")


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _usage(completion: Completion) -> Usage:
    return Usage.of(completion.num_prompt_tokens, completion.num_completion_tokens)
