"""The HTTP application around a gateway: routes, documents, the page."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Security
from fastapi.responses import HTMLResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from vlmray import __version__
from vlmray.protocol.answers import ChatCompletion, ErrorBody, ModelCard, ModelList
from vlmray.protocol.errors import ApiError
from vlmray.protocol.request import ChatRequest, read_request
from vlmray.serving.errors import to_response
from vlmray.serving.gateway import Gateway
from vlmray.serving.http.body import read_body
from vlmray.serving.http.docs import render_docs
from vlmray.serving.http.middleware import CHAT, Counted, Guard, Tidy

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "Not JSON, a value that a field cannot have, an image that cannot be read, a prompt that is too "
        "long, or something that is not supported.",
        401: "No API key, or a wrong one.",
        404: "No such model.",
        413: "Body too large.",
        415: "A compressed body.",
        503: "Too many requests are waiting, or the server is stopping; try again after Retry-After seconds.",
    }.items()
}
_REF = "#/components/schemas/{model}"
_EVENT = {"data": {"type": "string", "description": "a chunk as JSON, or [DONE]"}}
_STREAM = {"text/event-stream": {"schema": {"type": "object", "properties": _EVENT}}}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": _REF.format(model="ChatRequest")}}},
    }
}


def build_app(gateway: Gateway, key_digest: bytes | None = None) -> FastAPI:
    """Make the ASGI application of a gateway.

    Args:
        gateway: What the routes call.
        key_digest: SHA-256 of the API key; None lets everybody in.
    """
    config = gateway.config
    app = FastAPI(
        title="vlmray",
        version=__version__,
        description="Vision-language models behind OpenAI's chat protocol.",
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Guard, key_digest=key_digest, max_bytes=config.max_body_bytes)
    app.add_middleware(Counted, metrics=gateway.metrics)
    app.add_middleware(Tidy)
    if config.origins():
        app.add_middleware(
            CORSMiddleware, allow_origins=config.origins(), allow_methods=["GET", "POST"],
            allow_headers=["*"], expose_headers=["Retry-After"],
        )  # fmt: skip
    _add_error_handlers(app)
    _add_model_routes(app, gateway)
    _add_open_routes(app, gateway)
    app.openapi = functools.partial(_with_request, app.openapi)  # type: ignore[method-assign]
    return app


def _add_model_routes(app: FastAPI, gateway: Gateway) -> None:
    """Add what needs the key."""
    with_key = [Security(HTTPBearer(auto_error=False, description="The API key; `Guard` checks it."))]

    @app.post(
        CHAT, dependencies=with_key, response_model=ChatCompletion, openapi_extra=_BODY,
        responses={200: {"content": _STREAM}, **_ERRORS},
    )  # fmt: skip
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation that may hold images."""
        return gateway.chat(read_request(await read_body(request)), request.state.count)

    @app.get("/v1/models", dependencies=with_key, responses={401: _ERRORS[401]})
    async def models() -> ModelList:
        """List the models that can be asked: the base and its adapters."""
        return await gateway.models()

    @app.get(
        "/v1/models/{model_id:path}", dependencies=with_key,
        responses={status: _ERRORS[status] for status in (401, 404)},
    )  # fmt: skip
    async def model(model_id: str) -> ModelCard:
        """Describe one of them."""
        return await gateway.model(model_id)

    @app.get("/metrics", dependencies=with_key, response_class=Response, responses={401: _ERRORS[401]})
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(await gateway.exposition(), media_type=CONTENT_TYPE_LATEST)


def _add_open_routes(app: FastAPI, gateway: Gateway) -> None:
    """Add what everybody may ask."""

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Tell that the server is alive; whether it can answer says `/ready`."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: _ERRORS[503]})
    async def ready() -> dict[str, str]:
        """Tell whether a model can answer."""
        await gateway.check_ready()
        return {"status": "ready"}

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        """What is spoken here, to read."""
        return HTMLResponse(render_docs(app.openapi()), headers={"Content-Security-Policy": _DOCS_POLICY})

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        """A page to try the models on."""
        return HTMLResponse(_read_page(), headers={"Content-Security-Policy": _PAGE_POLICY})


def _with_request(make_document: Any) -> dict[str, Any]:
    """Add what a chat request is to the OpenAPI document: its body is parsed here, not by FastAPI."""
    document: dict[str, Any] = make_document()
    schema = ChatRequest.model_json_schema(ref_template=_REF)
    document["components"]["schemas"] |= {**schema.pop("$defs"), "ChatRequest": schema}
    return document


_DOCS_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"
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
        return to_response(error)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        found = ApiError(error.status_code, str(error.detail))
        found.headers.update(error.headers or {})
        return to_response(found)

    @app.exception_handler(Exception)
    async def on_failure(request: Request, error: Exception) -> Response:
        return to_response(ApiError(500, "the server failed; its log says why"))
