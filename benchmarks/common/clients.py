"""A closed loop of clients: each asks its next question when it has the answer to the last."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

import numpy as np


def make_body(model: str, image: bytes, question: str, *, stream: bool, **settings: Any) -> bytes:
    """Write a request about an image, which travels as a data URI."""
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    message = {"role": "user", "content": parts}
    return json.dumps({"model": model, "messages": [message], "stream": stream, **settings}).encode()


def measure_clients(port: int, bodies: Sequence[bytes], num_clients: int) -> dict[str, float]:
    """Ask every body once.

    Returns:
        Requests/s, and percentiles in milliseconds of the times to the whole answers; of streams, to their
        first text.
    """
    local = threading.local()

    def ask(body: bytes) -> float:
        if not hasattr(local, "connection"):
            local.connection = HTTPConnection("127.0.0.1", port, timeout=300)
        # A client that had to wait for the others finds that the server has closed its connection.
        local.connection.close()
        local.connection.connect()
        started = time.perf_counter()
        local.connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = local.connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"HTTP {response.status}: {response.read().decode()}")
        is_stream = response.headers.get_content_type() == "text/event-stream"
        first_s = _read_first_text(response.readline) if is_stream else None
        response.read()
        return (first_s or time.perf_counter()) - started

    with ThreadPoolExecutor(num_clients) as pool:
        started = time.perf_counter()
        times_ms = [1000 * elapsed_s for elapsed_s in pool.map(ask, bodies)]
        elapsed_s = time.perf_counter() - started
    percentiles = {f"p{percent}_ms": float(np.percentile(times_ms, percent)) for percent in (50, 95, 99)}
    return {"requests_per_s": len(bodies) / elapsed_s, **percentiles}


def _read_first_text(readline: Callable[[], bytes]) -> float:
    """Read events up to the first with text, and return when it came."""
    while line := readline():
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:])["choices"]
            if choices and choices[0]["delta"].get("content"):
                break
    return time.perf_counter()
