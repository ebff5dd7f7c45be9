"""Clients in a closed loop: each asks its next question when it has the answer to the last."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How many ask at a time, and how much in all."""

    concurrency: int
    num_requests: int


def measure_clients(
    port: int, bodies: Sequence[bytes], load: Load, *, stream: bool = False, warms_up: bool = True
) -> dict[str, float]:
    """Return requests/s and percentiles of the times to the answers, and of streams to their first text too.

    Args:
        port: Of a server on this machine.
        bodies: Requests, asked in turn, and again from the first where there are not enough.
        load: How many ask.
        stream: Whether the requests ask for streams.
        warms_up: Ask some before, for connections and code paths.
    """
    local = threading.local()

    def ask(number: int) -> tuple[float, float]:
        if not hasattr(local, "connection"):
            local.connection = HTTPConnection("127.0.0.1", port, timeout=300)
        # A client that had to wait for the others finds that the server has closed its connection.
        local.connection.close()
        local.connection.connect()
        started = time.perf_counter()
        local.connection.request(
            "POST", "/v1/chat/completions", bodies[number % len(bodies)], {"Content-Type": "application/json"}
        )
        response = local.connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"HTTP {response.status}: {response.read().decode()}")
        first_s = read_first_text(response.readline) if stream else time.perf_counter()
        response.read()
        return first_s - started, time.perf_counter() - started

    with ThreadPoolExecutor(load.concurrency) as pool:
        if warms_up:
            list(pool.map(ask, range(load.concurrency)))
        started = time.perf_counter()
        firsts, wholes = zip(*pool.map(ask, range(load.num_requests)), strict=True)
        elapsed_s = time.perf_counter() - started
    times = {"": wholes, "first_": firsts} if stream else {"": wholes}
    return {
        "requests_per_s": load.num_requests / elapsed_s,
        **{f"{which}{name}_ms": value for which, of in times.items() for name, value in _percentiles(of)},
    }


def _percentiles(seconds: Sequence[float]) -> list[tuple[str, float]]:
    found = statistics.quantiles((1000 * each for each in seconds), n=100, method="inclusive")
    return [(f"p{at}", found[at - 1]) for at in (50, 95, 99)]


def read_first_text(readline: Callable[[], bytes]) -> float:
    """Read events up to the first with text, and return when it came."""
    while line := readline():
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:])["choices"]
            if choices and choices[0]["delta"].get("content"):
                break
    return time.perf_counter()
