"""What does serving cost, and what does batching bring? A closed loop of clients against one replica.

    python -m benchmarks.serving
    python -m benchmarks.serving --dataset_name path/to/ChartQA --num_requests 96 --clients 1 8 32

Every client asks its next question when it has the answer to the last: one about a chart, by data URI.
Clients, server and model share this machine's cores, so the less the model has to do for a request, the more
the rest shows. `bare engine` is the engine without a server, on the same requests in batches of the same
size, run before and after; its mean counts. Times are of whole answers; `first text` is measured on streams,
in a pass of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from benchmarks.common.clients import make_body, measure_clients
from vlmray.config import ServeConfig
from vlmray.dataset.columns import get_dataset_columns
from vlmray.dataset.rows import read_rows
from vlmray.dataset.sources import open_source
from vlmray.engines import build_engine
from vlmray.schema import GenerationRequest
from vlmray.serving.server import serve_app

CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
NUM_SAMPLES = 32


def main() -> None:
    """Measure, and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model_id", default="tiny-random")
    parser.add_argument("--dataset_name", default="charts?kind=bar&style=plain&questions_per_image=1")
    parser.add_argument("--dataset_split", default="test")
    parser.add_argument(
        "--num_requests", type=int, default=256, help="at each concurrency; fewer clients ask fewer"
    )
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--max_batch_size", type=int, default=32)
    parser.add_argument(
        "--clients", type=int, nargs="+", default=CONCURRENCIES, help="with 1 and 32 among them"
    )
    parser.add_argument("--port", type=int, default=8199)
    options = parser.parse_args()
    rows = read_samples(options)
    bare = [measure_engine(options, rows)]
    config = ServeConfig(
        model_id=options.model_id, max_batch_size=options.max_batch_size, num_replicas="1", dtype="float32",
        max_new_tokens=options.max_new_tokens, port=options.port,
    )  # fmt: skip
    table = []
    with serve_app(config):
        for concurrency in options.clients:
            num_requests = max(24, options.num_requests * min(concurrency, 32) // 32)
            figures = measure_rows(options, rows, concurrency, num_requests, stream=False)
            streams = measure_rows(options, rows, concurrency, num_requests, stream=True)
            table.append({"concurrency": concurrency, **figures, "ttft_ms": streams["p50_ms"]})
    bare.append(measure_engine(options, rows))
    print(
        f"{options.model_id}, at most {options.max_new_tokens} tokens each, batches of"
        f" {options.max_batch_size}\n"
    )
    print(
        f"{'clients':>7} {'requests/s':>10} {'p50 ms':>8} {'p95 ms':>8} {'p99 ms':>8} {'first text ms':>13}"
    )
    for row in table:
        times = " ".join(f"{row[name]:8.0f}" for name in ("p50_ms", "p95_ms", "p99_ms"))
        print(f"{row['concurrency']:7} {row['requests_per_s']:10.1f} {times} {row['ttft_ms']:13.0f}")
    rates = {row["concurrency"]: row["requests_per_s"] for row in table}
    to_bare, to_one = rates[32] / statistics.mean(bare), rates[32] / rates[1]
    print(f"\nbare engine: {bare[0]:.1f} and {bare[1]:.1f} requests/s")
    print(f"32 clients: {to_bare:.2f} of the bare engine, {to_one:.1f} times one client")
    print(json.dumps({**vars(options), "table": table, "bare": bare, "to_bare": to_bare, "to_one": to_one}))


def read_samples(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Read the first questions, each with its image as encoded bytes."""
    source = open_source(options.dataset_name, options.dataset_split)
    spec = get_dataset_columns(options.dataset_name, source.column_names)
    return read_rows(source, spec, options.dataset_split, range(NUM_SAMPLES))


def measure_engine(options: argparse.Namespace, rows: list[dict[str, Any]]) -> float:
    """Return requests/s of the engine alone."""
    engine = build_engine(
        engine="transformers", model_id=options.model_id, dtype="float32", batch_size=options.max_batch_size
    )
    requests = []
    for row in rows:
        parts = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        requests.append(
            GenerationRequest(
                request_id="bench", images=row["images"], max_new_tokens=options.max_new_tokens,
                messages=[{"role": "user", "content": parts}],
            )
        )  # fmt: skip
    engine.generate(requests)  # the first pass sets things up
    started, num_done = time.perf_counter(), 0
    while num_done < options.num_requests:
        num_done += len(engine.generate(requests))
    elapsed_s = time.perf_counter() - started
    engine.close()
    return num_done / elapsed_s


def measure_rows(
    options: argparse.Namespace,
    rows: list[dict[str, Any]],
    concurrency: int,
    num_requests: int,
    *,
    stream: bool,
) -> dict[str, float]:
    """Have clients ask the questions in turn, and return what they saw."""
    bodies = [make_body(options.model_id, row["images"][0], row["question"], stream=stream) for row in rows]
    measure_clients(options.port, bodies[:concurrency], concurrency)  # connections and code paths
    asked = [bodies[number % len(bodies)] for number in range(num_requests)]
    return measure_clients(options.port, asked, concurrency)


if __name__ == "__main__":
    main()
