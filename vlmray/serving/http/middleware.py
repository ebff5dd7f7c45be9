"""What happens to HTTP requests before and behind their routes: paths, counts, keys, bounds."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect

from vlmray.protocol.errors import ApiError
from vlmray.serving.errors import to_response
from vlmray.serving.monitoring import CLIENT_LEFT, Count, Metrics

CHAT = "/v1/chat/completions"
OPEN_PATHS = ("/", "/health", "/ready", "/docs", "/openapi.json")
"""All others need the key."""

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Tidy:
    """ASGI middleware that forgives doubled and trailing slashes, and answers HEAD where there is GET."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Pass a tidy request on, and of what comes back for a HEAD the head."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = re.sub(r"^/+(v1/)?/*", lambda match: f"/{match[1] or ''}", scope["path"])
        scope = {**scope, "path": path.rstrip("/") or "/"}
        if scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def send_head(message: Any) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self.app({**scope, "method": "GET"}, receive, send_head)


class Counted:
    """ASGI middleware that counts chat requests by what became of them, whoever answered them."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Pass everything on, with a `Count` in the state of chat requests."""
        if scope["type"] != "http" or (scope["method"], scope["path"]) != ("POST", CHAT):
            await self.app(scope, receive, send)
            return
        count = Count()
        sent: int | None = None

        async def watched(message: Any) -> None:
            nonlocal sent
            if message["type"] == "http.response.start":
                sent = message["status"]
            await send(message)

        try:
            await self.app({**scope, "state": {**scope.get("state", {}), "count": count}}, receive, watched)
        except ClientDisconnect:  # before its body had come
            count.status = CLIENT_LEFT
        except asyncio.CancelledError:
            count.status = count.status or CLIENT_LEFT
            raise
        finally:
            self.metrics.ended(count.model, count.status or sent or 500)


class Guard:
    """ASGI middleware that refuses requests without the key, and bodies larger than they may be.

    Both happen before anything of the body is parsed.
    """

    def __init__(self, app: Any, key_digest: bytes | None, max_bytes: int) -> None:
        self.app = app
        self.key_digest = key_digest
        self.max_bytes = max_bytes

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Pass everything else on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        authorization = headers.get(b"authorization", b"")
        if scope["path"] not in OPEN_PATHS and not self._admits(authorization):
            found = "this API key is wrong" if authorization.strip() else "there is no API key"
            refusal = ApiError(
                401, f"{found}; send it as 'Authorization: Bearer KEY'", code="invalid_api_key"
            )
            await to_response(refusal)(scope, receive, send)
            return
        error = ApiError(413, f"the body is larger than {self.max_bytes} bytes")
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self.max_bytes:
            await to_response(error)(scope, receive, send)
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
            await to_response(error)(scope, receive, send)

    def _admits(self, authorization: bytes) -> bool:
        """Tell whether a header holds the API key, in time that does not depend on what it holds."""
        if self.key_digest is None:
            return True
        scheme, _, key = authorization.partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        return hmac.compare_digest(given, self.key_digest) and scheme.lower() == b"bearer"
