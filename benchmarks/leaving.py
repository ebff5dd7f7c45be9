"""How long do clients that leave hold up the next one? Forty of them, and a question asked right behind.

    python -m benchmarks.leaving
    python -m benchmarks.leaving --clients 40 --leave_after_s 0.7 --rounds 7

The clients ask the built-in model for long answers, about a chart each, and close their connections after
a while, all at once; the question comes from another one right then. Its time alone, on an idle server, is
taken before each round; what it takes longer is the delay. It is put beside what the model does at a time: a
batch's first step, which reads all its prompts and images, and the later ones, a token each. Meanwhile
`/metrics` has to say how many are in progress: all of them before they leave, none soon after.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

from benchmarks.common.clients import make_body
from benchmarks.serving import read_samples
from vlmray.config import ServeConfig
from vlmray.serving.server import serve_app


def main() -> None:
    """Measure with streams and without, and print a line of each and one of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model_id", default="builtin")
    parser.add_argument("--dataset_name", default="charts?kind=bar&style=plain&questions_per_image=1")
    parser.add_argument("--dataset_split", default="test")
    parser.add_argument("--clients", type=int, default=40)
    parser.add_argument("--leave_after_s", type=float, default=0.7)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--max_batch_size", type=int, default=16)
    parser.add_argument("--port", type=int, default=8765)
    options = parser.parse_args()
    config = ServeConfig(
        model_id=options.model_id, port=options.port, max_batch_size=options.max_batch_size, dtype="float32"
    )
    rows = read_samples(options)
    with serve_app(config):
        first_s, step_s = measure_steps(options, rows)
        found = {
            kind: measure_delays(options, rows, stream)
            for kind, stream in (("streams", True), ("whole answers", False))
        }
    for kind, delays_s in found.items():
        worst, middle = 1000 * max(delays_s), 1000 * statistics.median(delays_s)
        print(
            f"{options.clients} clients left their {kind} after {options.leave_after_s} s: the next question "
            f"took {middle:.0f} ms longer than alone, at most {worst:.0f} ms, {max(delays_s) / first_s:.2f} "
            f"of a batch's first step ({1000 * first_s:.0f} ms; the later ones {1000 * step_s:.0f} ms)"
        )
    print(json.dumps({**vars(options), "first_s": first_s, "step_s": step_s, "delays_s": found}))


def measure_steps(options: argparse.Namespace, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the seconds of the first token of a full batch, and of a later one."""

    def answer_all(max_tokens: int) -> float:
        started = time.perf_counter()
        with ThreadPoolExecutor(options.max_batch_size) as pool:
            list(
                pool.map(
                    lambda row: ask(options, long_body(options, row, max_tokens)),
                    rows[: options.max_batch_size],
                )
            )
        return time.perf_counter() - started

    answer_all(2)  # the first sets things up
    first, long = (min(answer_all(count) for _ in range(3)) for count in (1, 65))
    return first, (long - first) / 64


def measure_delays(options: argparse.Namespace, rows: list[dict[str, Any]], stream: bool) -> list[float]:
    """Return, of each round, by how much the question was held up."""
    delays_s = []
    question = long_body(options, rows[0], 4)
    for _ in range(options.rounds):
        alone_s = min(ask(options, question) for _ in range(3))
        with contextlib.ExitStack() as stack:
            for number in range(options.clients):
                body = long_body(options, rows[number % len(rows)], 4000, stream)
                stack.enter_context(asking(options, body))
            time.sleep(options.leave_after_s)
            check(in_progress(options) == options.clients, "all are in progress before they leave")
        delays_s.append(ask(options, question) - alone_s)
        deadline = time.monotonic() + 5
        while in_progress(options):
            check(time.monotonic() < deadline, "none is in progress soon after they left")
    return delays_s


def long_body(
    options: argparse.Namespace, row: dict[str, Any], max_tokens: int, stream: bool = False
) -> bytes:
    """Write a request whose answer has just so many tokens."""
    body = json.loads(make_body(options.model_id, row["images"][0], row["question"], stream=stream))
    return json.dumps({**body, "max_tokens": max_tokens, "ignore_eos": True}).encode()


@contextlib.contextmanager
def asking(options: argparse.Namespace, body: bytes) -> Iterator[HTTPConnection]:
    """Send a request; the connection is closed behind the block."""
    connection = HTTPConnection("127.0.0.1", options.port, timeout=300)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    try:
        yield connection
    finally:
        connection.close()


def ask(options: argparse.Namespace, body: bytes) -> float:
    """Return the seconds to a whole answer."""
    started = time.perf_counter()
    with asking(options, body) as connection:
        response = connection.getresponse()
        check(response.status == 200, f"HTTP {response.status}: {response.read(500)!r}")
        response.read()
    return time.perf_counter() - started


def in_progress(options: argparse.Namespace) -> float:
    """Return what the server's metrics say of requests in progress."""
    connection = HTTPConnection("127.0.0.1", options.port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vlmray_requests_in_flight "))


def check(holds: bool, what: str) -> None:
    """End the run where something does not hold that has to."""
    if not holds:
        raise SystemExit(f"not so: {what}")


if __name__ == "__main__":
    main()
