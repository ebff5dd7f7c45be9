"""The HTTP application around a gateway: routes, keys, bounds, the page."""

from __future__ import annotations

import functools
import hashlib
import hmac
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from vlmray import __version__
from vlmray.serving.errors import ApiError
from vlmray.serving.gateway import Gateway
from vlmray.serving.protocol import ChatCompletion, ChatRequest, ErrorBody, ModelList

_OPEN_PATHS = ("/", "/health", "/docs", "/openapi.json")  # all others need the key
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


class Guard:
    """ASGI middleware that refuses requests without the key, and bodies larger than they may be.

    Both happen before anything of the body is parsed.
    """

    def __init__(self, app: Any, key_digest: bytes | None, max_bytes: int) -> None:
        self.app = app
        self.key_digest = key_digest
        self.max_bytes = max_bytes

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        """Pass everything else on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if scope["path"] not in _OPEN_PATHS and not self._admits(headers.get(b"authorization", b"")):
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

    def _admits(self, authorization: bytes) -> bool:
        """Tell whether a header holds the API key, in time that does not depend on what it holds."""
        if self.key_digest is None:
            return True
        scheme, _, key = authorization.partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        return hmac.compare_digest(given, self.key_digest) and scheme.lower() == b"bearer"


def build_app(gateway: Gateway, key_digest: bytes | None = None) -> FastAPI:
    """Make the ASGI application of a gateway.

    Args:
        gateway: What the routes call.
        key_digest: SHA-256 of the API key; None lets everybody in.
    """
    app = FastAPI(
        title="vlmray",
        version=__version__,
        description="Vision-language models behind OpenAI's chat protocol.",
        redoc_url=None,
    )
    app.add_middleware(Guard, key_digest=key_digest, max_bytes=gateway.config.max_body_bytes)
    _add_error_handlers(app)
    with_key = [Security(HTTPBearer(auto_error=False, description="The API key; `Guard` checks it."))]

    @app.post(
        "/v1/chat/completions", dependencies=with_key, response_model=ChatCompletion,
        responses={200: {"content": _STREAM}, **_ERRORS},
    )  # fmt: skip
    async def chat_completions(chat: ChatRequest) -> Response:
        """Answer a conversation that may hold images."""
        return gateway.chat(chat)

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
