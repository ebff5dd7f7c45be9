"""What does `vlmray serve --engine vllm` cost beside `vllm serve`? The same clients, servers in turn.

    python -m benchmarks.engine.vllm_serving --processor path/to/Qwen2.5-VL-7B-Instruct \\
        --dataset_name path/to/ChartQA

In an environment that has vLLM. Every turn starts a server with empty caches, asks all that is asked, whole
answers and streams, and stops it. Each load has rows of its own, the same for both servers, and answers have
the lengths of the labels. `first text` is the time to it, of streams. Clients share this machine's cores.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.clients import Load, measure_clients
from benchmarks.common.models import build_random_model
from benchmarks.common.requests import read_requests
from benchmarks.engine.vllm_speed import ROOT, SAME, infer_config
from vlmray.config import EngineConfig
from vlmray.engines.openai.images import PixelBounds
from vlmray.engines.openai.wire import to_body
from vlmray.engines.vllm.options import engine_args
from vlmray.models.processors import load_processor
from vlmray.schema import GenerationRequest

NAME = "model"
_NUM_FIRST = 4  # requests that warm a server up
SERVERS = ("vllm", "vlmray")
Figures = dict[str, float]


def main() -> None:
    """Measure, and print a table and one JSON line."""
    options = parse_options()
    loads = [Load(concurrency=n, num_requests=max(options.num_requests, n)) for n in options.clients]
    options.num_rows = _NUM_FIRST + 2 * sum(load.num_requests for load in loads)
    turns: list[dict[str, dict[str, Figures]]] = []
    with tempfile.TemporaryDirectory() as folder:
        options.model_path = build_random_model(options.model_id, options.processor, Path(folder) / "model")
        requests = read_requests(infer_config(options, folder), load_processor(options.model_path).tokenizer)
        for repeat in range(options.repeats):
            order = options.servers if repeat % 2 == 0 else options.servers[::-1]
            turns.append({server: take_turn(options, server, requests, loads) for server in order})
    print_table(options, turns)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_id", default="random-132m", help="one of benchmarks/common/models.py")
    parser.add_argument("--processor", required=True, help="folder of tokenizer, processor and config")
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--num_requests", type=int, default=24, help="of a load; at least one a client")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num_threads", type=int, default=os.cpu_count())
    parser.add_argument("--engine_options", type=json.loads, default={}, help="of vLLM, for both")
    parser.add_argument("--servers", nargs="+", default=list(SERVERS), choices=SERVERS)
    parser.add_argument("--port", type=int, default=8197)
    return parser.parse_args()


def take_turn(
    options: argparse.Namespace, server: str, requests: Sequence[GenerationRequest], loads: Sequence[Load]
) -> dict[str, Figures]:
    """Start a server, and measure each load, whole answers and streams."""
    found: dict[str, Figures] = {}
    rest = iter(requests)
    with running(options, server):
        first = Load(concurrency=_NUM_FIRST, num_requests=_NUM_FIRST)
        measure_clients(options.port, take(rest, first, stream=True), first, stream=True, warms_up=False)
        for load in loads:
            for stream in (False, True):
                bodies = take(rest, load, stream)
                figures = measure_clients(options.port, bodies, load, stream=stream, warms_up=False)
                found[f"{load.concurrency} {'streams' if stream else 'whole'}"] = figures
                print(f"{server} {load.concurrency} {stream}: {figures}", file=sys.stderr, flush=True)
    return found


def take(requests: Iterator[GenerationRequest], load: Load, stream: bool) -> list[bytes]:
    """Write the next requests of a load."""
    bodies = []
    for _ in range(load.num_requests):
        request = dataclasses.replace(next(requests), ignore_eos=True)
        body = to_body(request, NAME, PixelBounds())
        body |= {**body.pop("extra_body"), "stream": stream}
        bodies.append(json.dumps(body).encode())
    return bodies


@contextlib.contextmanager
def running(options: argparse.Namespace, server: str) -> Iterator[None]:
    """Run a server meanwhile."""
    command = {"vllm": vllm_command, "vlmray": vlmray_command}[server](options)
    environment = {
        **os.environ, **SAME, "PYTHONPATH": str(ROOT), "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    if server == "vllm":
        environment |= {"OMP_NUM_THREADS": str(options.num_threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=sys.stderr, start_new_session=True)
    try:
        wait_until_ready(options.port, process)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def vllm_command(options: argparse.Namespace) -> list[str]:
    """Return how vLLM's own server is started with what vlmray gives the engine."""
    args = engine_args(
        options.model_path, EngineConfig(engine="vllm", engine_options=options.engine_options),
        on_gpu=False, memory_fraction=1.0, max_adapters=0, max_rank=0,
    )  # fmt: skip
    flags = [part for name, value in args.items() if name != "model" for part in flag(name, value)]
    return [  # `vllm serve` itself asks for the package by a name that its build for CPUs has not
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args["model"], *flags,
        "--served-model-name", NAME, "--port", str(options.port),
        "--no-enable-log-requests", "--disable-uvicorn-access-log",
    ]  # fmt: skip


def flag(name: str, value: Any) -> list[str]:
    """Write an option as vLLM's command line takes it."""
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{dashed}" if value else f"--no-{dashed}"]
    return [f"--{dashed}={json.dumps(value) if isinstance(value, dict) else value}"]


def vlmray_command(options: argparse.Namespace) -> list[str]:
    """Return how our server is started."""
    return [
        sys.executable, "jobs/serve.py", "--engine=vllm", f"--model_id={options.model_path}",
        f"--served_model_name={NAME}", f"--port={options.port}",
        f"--engine_options={json.dumps(options.engine_options)}",
    ]  # fmt: skip


def wait_until_ready(port: int, process: subprocess.Popen[bytes], timeout_s: float = 240) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
            return
        time.sleep(0.5)
    raise SystemExit("the server does not start; see above")


def print_table(options: argparse.Namespace, turns: Sequence[dict[str, dict[str, Figures]]]) -> None:
    """Print medians of each load, side by side, with what the aims are about."""
    one, other = options.servers[0], options.servers[-1]
    print(f"\n{options.model_id}, {options.repeats} repeats, {options.num_threads} threads, float32\n")
    heads = (f"{one} req/s", f"{other} req/s", "ratio", "lowest", "highest", f"{one} first ms",
             f"{other} first ms", "more ms")  # fmt: skip
    print(f"{'clients':12} " + " ".join(f"{head:>15}" for head in heads))
    report: dict[str, Any] = {}
    for load in turns[0][one]:
        rates = {name: [turn[name][load]["requests_per_s"] for turn in turns] for name in options.servers}
        ratios = [b / a for a, b in zip(rates[one], rates[other], strict=True)]
        report[load] = {"requests_per_s": rates, "ratio": ratios}
        cells = [*map(statistics.median, (rates[one], rates[other], ratios)), min(ratios), max(ratios)]
        if load.endswith("streams"):
            firsts = {name: [turn[name][load]["first_p50_ms"] for turn in turns] for name in options.servers}
            report[load]["first_p50_ms"] = firsts
            first, second = (statistics.median(firsts[name]) for name in (one, other))
            cells += [first, second, second - first]
        print(f"{load:12} " + " ".join(f"{cell:15.3f}" for cell in cells))
    print(json.dumps({**vars(options), "loads": report}))


if __name__ == "__main__":
    main()
