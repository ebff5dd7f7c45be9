"""A server of OpenAI's protocol that refuses, drops, stalls and has a hard capacity: on purpose, and seeded.

It keeps what it saw: how many requests were in flight at every moment, and how often each was answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

MODEL = "faulty"
_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 429: "Too Many Requests", 503: "Unavailable"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Shares of requests that something befalls, and what the server can take."""

    refuse: float = 0.0
    """429, every second one with Retry-After: seconds and HTTP dates in turn."""

    unavailable: float = 0.0
    """503."""

    drop: float = 0.0
    """The connection ends, before the answer or in the middle of it."""

    stall: float = 0.0
    """No answer comes, until the client leaves."""

    capacity: int = 10**6
    """Above so many in flight a request is answered 503."""

    latency_s: float = 0.05
    token_s: float = 0.0
    retry_after_s: float = 0.5
    key: str | None = None
    bad: str = "unreadable"
    """A request whose text holds this is answered 400."""

    seed: int = 0


@dataclass(slots=True)
class Seen:
    """What became of requests."""

    started: float = field(default_factory=time.monotonic)
    in_flight: int = 0
    curve: list[tuple[float, int]] = field(default_factory=list)
    """Seconds, and requests in flight from then on."""

    over: list[float] = field(default_factory=list)
    """When a request was one too many."""

    faults: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    """How often each text was answered."""

    bodies: list[dict[str, Any]] = field(default_factory=list)

    def change(self, by: int) -> None:
        self.in_flight += by
        self.curve.append((time.monotonic() - self.started, self.in_flight))


def answer_to(text: str) -> str:
    """What the server says: a few words that depend on the question."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return " ".join(["answer", *(digest[at : at + 4] for at in range(0, 4 + 4 * int(digest[0], 16), 4))])


class FaultyServer:
    """The server; `running` has it run in a thread.

    Args:
        faults: What befalls requests.
        answer: What it says to a text; words with spaces between them.
    """

    def __init__(self, faults: Faults, answer: Callable[[str], str] = answer_to) -> None:
        self.faults = faults
        self._answer = answer
        self.seen = Seen()
        self.url = ""
        self._random = random.Random(faults.seed)
        self._num_left = 10**9

    def leave_after(self, number: int) -> None:
        """Break every connection once so many more requests were answered."""
        self._num_left = number

    @contextlib.contextmanager
    def running(self, port: int = 0) -> Iterator[FaultyServer]:
        loop, listens = asyncio.new_event_loop(), threading.Event()

        async def serve() -> None:
            server = await asyncio.start_server(self._serve, "127.0.0.1", port, limit=2**26, backlog=1024)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            listens.set()
            try:
                await asyncio.Event().wait()
            finally:
                server.close()

        def run() -> None:
            asyncio.set_event_loop(loop)
            with contextlib.suppress(asyncio.CancelledError):
                loop.run_until_complete(main)
            rest = asyncio.all_tasks(loop)
            for task in rest:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*rest, return_exceptions=True))
            loop.close()

        main = loop.create_task(serve())
        thread = threading.Thread(target=run, name="faulty-server")
        thread.start()
        assert listens.wait(10)
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(main.cancel)
            thread.join()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ahead = b""
        try:
            while True:
                head = (ahead + await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                work = asyncio.create_task(self._respond(head.split(" ")[1], headers, body, writer))
                watch = asyncio.create_task(reader.read(1))
                await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():  # the client has left
                    work.cancel()
                    await asyncio.gather(work, return_exceptions=True)
                    return
                ahead = await watch if work.result() else b""
                if not ahead:
                    watch.cancel()
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    async def _respond(
        self, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter
    ) -> bool:
        """Answer one request; return whether the connection lives on."""
        if self.faults.key and headers.get("authorization") != f"bearer {self.faults.key}".lower():
            return await _send(writer, 401, {"error": {"message": "wrong key"}})
        if path.endswith("/models"):
            return await _send(writer, 200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        self.seen.change(+1)
        try:
            return await self._chat(json.loads(body), writer)
        finally:
            self.seen.change(-1)

    async def _chat(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        self.seen.bodies.append({name: value for name, value in body.items() if name != "messages"})
        if self.seen.in_flight > self.faults.capacity:
            self.seen.over.append(time.monotonic() - self.seen.started)
            return await _send(writer, 503, {"error": {"message": "over capacity"}})
        if self._num_left <= 0:
            return False
        self._num_left -= 1
        fault = self._draw()
        self.seen.faults[fault] += 1
        if fault in ("429", "503"):
            return await self._refuse(int(fault), writer)
        text = _text_of(body)
        if self.faults.bad in text:
            return await _send(writer, 400, {"error": {"message": "no such image", "code": "bad_image"}})
        if fault == "stall":
            await asyncio.Event().wait()
        words = self._answer(text).split(" ")
        half = self._random.random() < 0.5
        await asyncio.sleep(
            self.faults.latency_s + self.faults.token_s * len(words) / (1 + (fault == "drop"))
        )
        if fault == "drop" and not half:
            return False
        done = await _send_answer(writer, words, is_stream=bool(body.get("stream")), cut=fault == "drop")
        self.seen.answered[text] += done
        return done

    def _draw(self) -> str:
        drawn = self._random.random()
        for name, share in (
            ("429", self.faults.refuse), ("503", self.faults.unavailable),
            ("drop", self.faults.drop), ("stall", self.faults.stall),
        ):  # fmt: skip
            if drawn < share:
                return name
            drawn -= share
        return "none"

    async def _refuse(self, status: int, writer: asyncio.StreamWriter) -> bool:
        count = self.seen.faults["429"]
        wait_s = self.faults.retry_after_s
        headers = {}
        if status == 429 and count % 2:
            is_date = count % 4 == 1
            headers["Retry-After"] = formatdate(time.time() + wait_s, usegmt=True) if is_date else f"{wait_s}"
        return await _send(writer, status, {"error": {"message": "too much to do"}}, headers)


def _text_of(body: dict[str, Any]) -> str:
    parts = [part for message in body["messages"] for part in message["content"]]
    return json.dumps([part.get("text") or hashlib.sha256(str(part).encode()).hexdigest() for part in parts])


async def _send(
    writer: asyncio.StreamWriter, status: int, body: Any, headers: dict[str, str] | None = None
) -> bool:
    data = json.dumps(body).encode()
    _write_head(writer, status, {"Content-Length": str(len(data)), **(headers or {})})
    writer.write(data)
    await writer.drain()
    return True


def _write_head(writer: asyncio.StreamWriter, status: int, headers: dict[str, str]) -> None:
    lines = [f"HTTP/1.1 {status} {_REASONS[status]}"]
    lines += [f"{name}: {value}" for name, value in {"Content-Type": "application/json", **headers}.items()]
    writer.write("\r\n".join([*lines, "", ""]).encode())


async def _send_answer(writer: asyncio.StreamWriter, words: list[str], *, is_stream: bool, cut: bool) -> bool:
    """Send an answer, or the first half of what is sent."""
    usage = {
        "prompt_tokens": 7, "completion_tokens": len(words), "total_tokens": 7 + len(words),
        "prompt_tokens_details": {"cached_tokens": 4},
    }  # fmt: skip
    about = {"id": "x", "created": 0, "model": MODEL}
    if not is_stream:
        message = {"role": "assistant", "content": " ".join(words)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        data = json.dumps(
            {**about, "object": "chat.completion", "choices": [choice], "usage": usage}
        ).encode()
        _write_head(writer, 200, {"Content-Length": str(len(data))})
        writer.write(data[: len(data) // 2] if cut else data)
        await writer.drain()
        return not cut
    _write_head(writer, 200, {"Content-Type": "text/event-stream", "Connection": "close"})
    pieces = [word if not place else f" {word}" for place, word in enumerate(words)]
    for piece in pieces[: len(pieces) // 2] if cut else pieces:
        _write_event(writer, {**about, "choices": [{"index": 0, "delta": {"content": piece}}]})
        await writer.drain()
        await asyncio.sleep(0.001)
    if not cut:
        _write_event(writer, {**about, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        _write_event(writer, {**about, "choices": [], "usage": usage})
        writer.write(b"data: [DONE]\n\n")
        await writer.drain()
    return False


def _write_event(writer: asyncio.StreamWriter, event: Any) -> None:
    writer.write(f"data: {json.dumps({'object': 'chat.completion.chunk', **event})}\n\n".encode())
