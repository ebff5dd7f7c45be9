"""The gateway over a backend of its own, and clients for it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler
from typing import Any

import uvicorn
from PIL import Image

from vlmray.config import ServeConfig
from vlmray.engines.fake import FakeEngine
from vlmray.schema import GenerationRequest
from vlmray.serving.backend import Piece, Reply
from vlmray.serving.errors import BusyError
from vlmray.serving.gateway import Gateway
from vlmray.serving.http.app import build_app

KEY = "open sesame"
MODEL = "fake"


def png(size: tuple[int, int] = (40, 30), colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


class Backend:
    """Answers with a fake engine, word by word; holds every answer while `open` is not set, and those of
    streams behind their first word while `flowing` is not."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.requests: list[GenerationRequest] = []
        self.open, self.flowing = threading.Event(), threading.Event()
        self.open.set()
        self.flowing.set()
        self.num_given_up = 0
        self.busy = False
        self.ready = True
        self.break_after: int | None = None

    async def answer(
        self, request: GenerationRequest, *, stream: bool
    ) -> AsyncGenerator[str | Piece | Reply]:
        if self.busy:
            raise BusyError("too many requests are waiting")
        self.requests.append(request)
        try:
            await until(self.open)
            (completion,) = self.engine.generate([request])
            words = completion.text.split(" ")
            for place, word in enumerate(words if stream else []):
                if self.break_after == place:
                    raise RuntimeError("secret detail")
                text = word if place == len(words) - 1 else f"{word} "
                yield Piece(text, (completion.logprobs[place],)) if completion.logprobs else text
                await until(self.flowing)
        except (asyncio.CancelledError, GeneratorExit):
            self.num_given_up += 1
            raise
        yield Reply(completion, 1)

    async def is_ready(self) -> bool:
        return self.ready

    async def max_model_len(self) -> int | None:
        return self.engine.max_model_len


async def until(event: threading.Event) -> None:
    while not event.is_set():
        await asyncio.sleep(0.01)


@contextlib.contextmanager
def serving(backend: Backend, key: str | None = KEY, **options: Any) -> Iterator[tuple[str, Gateway]]:
    """A gateway on a free port of this machine."""
    config = ServeConfig(model_id=MODEL, adapters="chart=/nowhere", **options)
    gateway = Gateway(config, backend)
    app = build_app(gateway, hashlib.sha256(key.encode()).digest() if key else None)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", gateway
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def ask(question: str = "How many?", *images: str, **fields: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    content = [*parts, {"type": "text", "text": question}]
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


def post(
    url: str,
    body: bytes | dict[str, Any],
    headers: dict[str, str] | None = None,
    path: str = "/v1/chat/completions",
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return status, body and headers of one request."""
    connection = HTTPConnection(url.removeprefix("http://"), timeout=20)
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    default = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before all was sent
            connection.request("POST", path, data, {**default, **(headers or {})})
        response = connection.getresponse()
        return response.status, json.loads(response.read()), dict(response.headers)
    finally:
        connection.close()


class Images(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/slow":
            for _ in range(400):
                with contextlib.suppress(OSError):
                    self.wfile.write(b"H")
                time.sleep(0.02)
            return
        self.send_response(302 if self.path.startswith("/to") else 200)
        if self.path == "/to-private":
            self.send_header("Location", "http://127.0.0.1/")
        self.end_headers()
        self.wfile.write(png() if self.path == "/ok" else bytes(2**22))

    def log_message(self, format: str, *args: object) -> None:
        pass


def says(role: str, content: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": role, "content": content}]}


def user(content: Any) -> dict[str, Any]:
    return says("user", content)


def read_all(url: str, body: dict[str, Any]) -> int:
    """Ask, read the answer whatever it is, and return its status."""
    connection = HTTPConnection(url.removeprefix("http://"), timeout=20)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
