"""The HTTP side of a server: checks, images, the protocol, streams, errors and metrics. No Ray, no model.

    HTTP -> key, size, JSON -> ChatRequest -> images -> GenerationRequest -> Backend -> answer or stream

Whoever holds the models implements `Backend`; `vlmray.serving` does it with Ray Serve.
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
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from starlette.exceptions import HTTPException

from vlmray import __version__
from vlmray.config import ServeConfig
from vlmray.images.decoding import ImageError, decode_image, read_image_bytes
from vlmray.schema import Completion, GenerationRequest
from vlmray.serving.adapters import AdapterCatalog
from vlmray.serving.protocol import (
    AnswerMessage,
    ChatCompletion,
    ChatRequest,
    Choice,
    Chunks,
    ErrorBody,
    ErrorDetail,
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
_OPEN_PATHS = ("/", "/health", "/docs", "/openapi.json")  # all others need the key
_TYPES = {401: "authentication_error", 404: "not_found_error", 500: "server_error", 503: "server_error"}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "Not JSON, an image that cannot be read, or something that is not supported.",
        401: "No API key, or a wrong one.",
        404: "No such model.",
        413: "Body too large.",
        422: "A field is missing or has a value it cannot take.",
        503: "Too many requests are waiting, or the server is stopping; try again after Retry-After seconds.",
    }.items()
}
_EVENT = {"data": {"type": "string", "description": "a chunk as JSON, or [DONE]"}}
_STREAM = {"text/event-stream": {"schema": {"type": "object", "properties": _EVENT}}}


@dataclass(frozen=True, slots=True)
class Reply:
    """The end of an answer."""

    completion: Completion
    batch_size: int
    """Requests that shared its forward pass."""


class BusyError(Exception):
    """There is no room for the request now."""


class Backend(Protocol):
    """Whoever answers."""

    def answer(self, request: GenerationRequest, *, stream: bool) -> AsyncIterator[str | Reply]:
        """Yield pieces of text, if `stream`, and last a `Reply` with all of it.

        Raises:
            BusyError: before the first piece.
        """
        ...


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_s: int = 0,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(
            message=message, type=_TYPES.get(status, "invalid_request_error"), param=param, code=code
        )
        self.headers = {"Retry-After": str(retry_s)} if retry_s else {}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def response(self) -> Response:
        """Write it as OpenAI does."""
        body = ErrorBody(error=self.detail).model_dump()
        return JSONResponse(body, status_code=self.status, headers=self.headers)


class Metrics:
    """What Prometheus is told, by model."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        make = functools.partial(self._make, labels=("model",))
        seconds = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
        self.requests = self._make(Counter, "requests", "Chat requests by status", labels=("model", "status"))
        self.in_flight = self._make(Gauge, "requests_in_flight", "Chat requests in progress", labels=())
        self.queued = make(Gauge, "requests_queued", "Of those, the ones whose answer has not begun")
        self.latency = make(Histogram, "request_seconds", "Time to the whole answer", buckets=seconds)
        self.first_token = make(
            Histogram, "time_to_first_token_seconds", "Time to the first text of a stream", buckets=seconds
        )
        self.prompt_tokens = make(Counter, "prompt_tokens", "Tokens read, visual ones included")
        self.completion_tokens = make(Counter, "completion_tokens", "Tokens written")
        self.batch_size = make(
            Histogram,
            "batch_size",
            "Requests in the forward pass of an answer",
            buckets=(1, 2, 4, 8, 16, 32, 64),
        )

    def _make(self, kind: Any, name: str, text: str, labels: tuple[str, ...], **options: Any) -> Any:
        return kind(f"vlmray_{name}", text, labels, registry=self.registry, **options)

    def count(self, model: str, reply: Reply) -> None:
        """Count one answer."""
        self.prompt_tokens.labels(model).inc(reply.completion.num_prompt_tokens)
        self.completion_tokens.labels(model).inc(reply.completion.num_completion_tokens)
        self.batch_size.labels(model).observe(reply.batch_size)


class Guard:
    """ASGI middleware that refuses requests without the key, and bodies larger than they may be.

    Both happen before anything of the body is parsed.
    """

    def __init__(self, app: Any, gateway: Gateway) -> None:
        self.app = app
        self.gateway = gateway
        self.max_bytes = gateway.config.max_body_bytes

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        """Pass everything else on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if scope["path"] not in _OPEN_PATHS and not self.gateway.admits(headers.get(b"authorization", b"")):
            refusal = ApiError(401, "wrong or missing API key; send it as 'Authorization: Bearer KEY'")
            await refusal.response()(scope, receive, send)
            return
        error = ApiError(413, f"the body is larger than {self.max_bytes} bytes")
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self.max_bytes:
            await error.response()(scope, receive, send)
            return
        num_bytes, started = 0, False

        async def counted() -> Any:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:
                raise error
            return message

        async def watched(message: Any) -> None:
            nonlocal started
            if started or num_bytes <= self.max_bytes:  # else it is what the application made of the error
                started = True
                await send(message)

        await self.app(scope, counted, watched)
        if num_bytes > self.max_bytes and not started:
            await error.response()(scope, receive, send)


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


def build_app(gateway: Gateway) -> FastAPI:
    """Make the ASGI application of a gateway."""
    app = FastAPI(
        title="vlmray",
        version=__version__,
        description="Vision-language models behind OpenAI's chat protocol.",
        redoc_url=None,
    )
    app.add_middleware(Guard, gateway=gateway)
    _add_error_handlers(app)
    with_key = [Security(HTTPBearer(auto_error=False, description="The API key; `Guard` checks it."))]

    @app.post(
        "/v1/chat/completions", dependencies=with_key, response_model=ChatCompletion,
        responses={200: {"content": _STREAM}, **_ERRORS},
    )  # fmt: skip
    async def chat_completions(chat: ChatRequest) -> Response:
        """Answer a conversation that may hold images."""
        return await gateway.chat(chat)

    @app.get("/v1/models", dependencies=with_key, responses={401: _ERRORS[401]})
    async def models() -> ModelList:
        """List the models that can be asked: the base and its adapters."""
        return await gateway.models()

    @app.get("/metrics", dependencies=with_key, response_class=Response, responses={401: _ERRORS[401]})
    async def metrics() -> Response:
        """Figures for Prometheus."""
        metrics = gateway.metrics
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/health", responses={503: _ERRORS[503]})
    async def health() -> dict[str, str]:
        """Tell whether requests are taken."""
        if gateway.draining:
            raise ApiError(503, "the server is stopping", retry_s=5)
        return {"status": "ok"}

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        """A page to try the models on."""
        return HTMLResponse(_read_page(), headers={"Content-Security-Policy": _PAGE_POLICY})

    return app


_PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data: blob:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@functools.cache
def _read_page() -> str:
    return (Path(__file__).parent / "chat.html").read_text(encoding="utf-8")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body") or None
        if first["type"] == "json_invalid":
            return ApiError(400, "the body is not JSON").response()
        message = f"{place or 'body'}: {first['msg']}"[:500]
        return ApiError(422, message, param=place and place[:200]).response()

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        found = ApiError(error.status_code, str(error.detail))
        found.headers.update(error.headers or {})
        return found.response()

    @app.exception_handler(Exception)
    async def on_failure(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed; its log says why").response()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _usage(completion: Completion) -> Usage:
    return Usage.of(completion.num_prompt_tokens, completion.num_completion_tokens)
