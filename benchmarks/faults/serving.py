"""Serving under fire: every request is answered, by a client that asks again what was not begun."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

_TIMEOUT_S = 60.0
_GIVE_UP_S = 180.0
_AGAIN_S = 0.2
_NUM_QUESTIONS = 20


class CutOffError(Exception):
    """A stream ended that had begun."""


class Serving:
    """`jobs/serve.py` with the fake engine, and clients that ask one question after another.

    Half of the requests are streams. Who is refused, or hears nothing of an answer, asks again, as clients
    of OpenAI's do by themselves; what has begun cannot be asked again unseen, and is counted as cut off.

    Args:
        folder: Where logs go.
        port: Where the server listens.
        num_requests: Requests of all clients together.
        num_clients: Clients, each with one request at a time.
    """

    name = "serve"
    titles: ClassVar[dict[str, str]] = {
        "replica": "ray::ServeReplica:vlmray:model",
        "gateway": "ray::ServeReplica:vlmray:gateway",
        "proxy": "ray::ProxyActor",
    }

    def __init__(self, folder: Path, port: int, num_requests: int = 3000, num_clients: int = 8) -> None:
        folder.mkdir()
        self.log = folder / "driver.log"
        self._port, self._num_requests = port, num_requests
        self._options = [
            "--engine", "fake", "--model_id", "fake?latency_s=0.02&token_s=0.02", "--num_replicas", "2",
            "--served_model_name", "fake", "--port", str(port),
        ]  # fmt: skip
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._texts: dict[int, str] = {}
        self._slowest_s = 0.0
        self._stopped = False
        self._clients = [threading.Thread(target=self._ask_on, daemon=True) for _ in range(num_clients)]

    def options(self, num_starts: int) -> Sequence[str]:
        if not num_starts:
            for client in self._clients:
                client.start()
        return self._options

    def progress(self) -> int:
        return self._counts["answered"]

    def has_served(self) -> bool:
        return not any(client.is_alive() for client in self._clients)

    def before_kill(self) -> None:
        pass  # clients notice by themselves

    def findings(self) -> dict[str, float]:
        self._stopped = True
        for client in self._clients:
            client.join()
        unanswered = self._num_requests - self._counts["answered"] - self._counts["cut_off"]
        return {
            "requests": self._num_requests,
            "lost": unanswered,
            "wrong": self._counts["wrong"],
            "cut_off": self._counts["cut_off"],
            "asked_again": self._counts["asked_again"],
            "slowest_s": round(self._slowest_s, 1),
        }

    def _ask_on(self) -> None:
        while not self._stopped and not _is_ready(self._port):
            time.sleep(_AGAIN_S)
        while not self._stopped:
            with self._lock:
                number = self._counts["asked"]
                self._counts["asked"] += 1
            if number >= self._num_requests:
                return
            self._ask_until_answered(number)

    def _ask_until_answered(self, number: int) -> None:
        started = time.monotonic()
        while not self._stopped and time.monotonic() < started + _GIVE_UP_S:
            try:
                text = _ask(self._port, number % _NUM_QUESTIONS, stream=bool(number % 2))
            except CutOffError:
                self._note("cut_off", started)
                return
            except (OSError, http.client.HTTPException):
                self._note("asked_again", started)
                time.sleep(_AGAIN_S)
                continue
            if text != self._texts.setdefault(number % _NUM_QUESTIONS, text):
                self._note("wrong", started)
            self._note("answered", started)
            return

    def _note(self, what: str, started: float) -> None:
        with self._lock:
            self._counts[what] += 1
            self._slowest_s = max(self._slowest_s, time.monotonic() - started)


def _is_ready(port: int) -> bool:
    """Whether a server is there whose models can answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _ask(port: int, question: int, *, stream: bool) -> str:
    """Return an answer's text.

    Raises:
        CutOffError: It broke off.
        OSError, HTTPException: It did not begin.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    body = {
        "model": "fake",
        "messages": [{"role": "user", "content": f"question {question}"}],
        "stream": stream,
    }
    try:
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        if response.status != 200:
            raise http.client.HTTPException(f"status {response.status}: {response.read(300)!r}")
        if not stream:
            return str(json.loads(response.read())["choices"][0]["message"]["content"])
        return _read_stream(response)
    finally:
        connection.close()


def _read_stream(response: http.client.HTTPResponse) -> str:
    text = ""
    try:
        while line := response.readline():
            if line.startswith(b"data: [DONE]"):
                return text
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    break
                text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    except (OSError, http.client.HTTPException):
        pass  # said below
    if text:
        raise CutOffError
    raise http.client.HTTPException("the stream ended before it began")
