"""What a proxy of Serve does with a request whose gateway is lost: it asks another one.

    client -> proxy (here) -> a gateway -> replicas

Serve calls `middlewares` in each proxy, where the environment variable `CALLBACK` names it.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.middleware import Middleware

from vlmray.protocol.errors import ApiError
from vlmray.serving.errors import to_response
from vlmray.serving.http.middleware import CHAT, Receive, Send

CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}:middlewares"}

_MAX_TRIES = 8
_PAUSE_S = 0.1


def middlewares() -> list[Middleware]:
    """Return what the proxies put around requests."""
    return [Middleware(Repeated)]


class Repeated:
    """ASGI middleware that makes a request again as long as no answer to it has begun.

    Of a gateway that is gone the proxy says nothing at all, not even a status. Proxies serve other
    applications too: what may change something there is left alone.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Pass a request on, several times if need be."""
        if scope["type"] != "http" or not _may_be_repeated(scope):
            await self.app(scope, receive, send)
            return
        request = _Request(receive, send)
        for num_tries in range(_MAX_TRIES):
            await asyncio.sleep(num_tries * _PAUSE_S)
            await self.app(dict(scope), request.reader(), request.send)
            if request.begun or request.left:
                break
        await request.end(scope)


def _may_be_repeated(scope: Any) -> bool:
    return scope["method"] in ("GET", "HEAD") or scope["path"].rstrip("/").endswith(CHAT)


class _Request:
    """One request: its body, kept until an answer begins, and how far that has come."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self.begun = self.left = False
        self._receive, self._send = receive, send
        self._read: list[Any] = []
        self._is_stream = self._ended = False

    def reader(self) -> Receive:
        """Return what a try reads: what those before it have read, then the rest."""
        again = iter([*self._read])

        async def receive() -> Any:
            for message in again:
                return message
            message = await self._receive()
            self.left |= message["type"] == "http.disconnect"
            if not self.begun:
                self._read.append(message)
            return message

        return receive

    async def send(self, message: Any) -> None:
        """Send a part of the answer."""
        if message["type"] == "http.response.start":
            self.begun = True
            self._read.clear()
            self._is_stream = b"text/event-stream" in dict(message["headers"]).get(b"content-type", b"")
        elif message["type"] == "http.response.body":
            self._ended = not message.get("more_body", False)
        await self._send(message)

    async def end(self, scope: Any) -> None:
        """Say what can be said where the answer has not come to its end."""
        if self._ended or self.left:
            return
        if not self.begun:
            error = ApiError(503, "the server has lost the request; send it again", retry_s=1)
            await to_response(error)(scope, self._receive, self._send)
        elif self._is_stream:
            body = {"error": ApiError(500, "the answer broke off").detail.model_dump()}
            event = f"data: {json.dumps(body)}\n\n".encode()
            await self._send({"type": "http.response.body", "body": event, "more_body": False})
