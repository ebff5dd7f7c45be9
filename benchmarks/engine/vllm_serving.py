"""What does `vlmray serve --engine vllm` cost beside vLLM's own server? The same clients, in turn.

    python -m benchmarks.engine.vllm_serving --processor path/to/Qwen2.5-VL-7B-Instruct \\
        --dataset_name path/to/ChartQA

In an environment that has vLLM. Both servers are processes of their own, with the same options of the
engine, and are started anew for every repeat. No question is asked twice of one server, so that its cache has
what rows of one image share and no more. Every client asks its next question when it has the answer to the
last, of the length of the label, whatever the model says; `first text` is measured on streams, in a pass of
their own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common.clients import make_body, measure_clients
from benchmarks.common.models import build_random_model
from benchmarks.common.requests import read_requests
from benchmarks.engine.beside_vllm import ROOT, make_parser, without_vlmray
from vlmray.config import EngineConfig, InferConfig
from vlmray.engines.vllm.options import engine_args
from vlmray.models.processors import load_processor
from vlmray.schema import GenerationRequest

SERVERS = ("vllm", "vlmray")
STARTS_WITHIN_S = 300
Figures = dict[str, float]


def main() -> None:
    """Measure, and print a table and one JSON line."""
    options = parse_options()
    with tempfile.TemporaryDirectory() as name:
        model_path = build_random_model(options.model_id, options.processor, Path(name) / "model")
        config = InferConfig(
            model_id=model_path, dataset_name=options.dataset_name, output_dir=name, max_new_tokens=64,
            sample_slices=f"[:{2 * sum(options.num_requests) + NUM_FIRST}]",
        )  # fmt: skip
        requests = read_requests(config, load_processor(model_path).tokenizer)
        rounds: list[dict[str, list[Figures]]] = []
        for repeat in range(options.repeats):
            order = SERVERS if repeat % 2 == 0 else SERVERS[::-1]
            rounds.append({name: measure(options, name, model_path, requests) for name in order})
    print_table(options, rounds)


NUM_FIRST = 4
"""Requests that come before the clock runs."""


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--num_requests", type=int, nargs="+", default=[16, 48, 96], help="of each pass")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num_threads", type=int, default=os.cpu_count())
    parser.add_argument("--port", type=int, default=8199)
    return parser.parse_args()


def measure(
    options: argparse.Namespace, server: str, model_path: str, requests: Sequence[GenerationRequest]
) -> list[Figures]:
    """Start a server, and return what each number of clients saw of it."""
    left = iter(requests)

    def bodies(number: int, *, stream: bool) -> list[bytes]:
        return [_body(next(left), stream=stream) for _ in range(number)]

    found = []
    with start(server, options, model_path):
        measure_clients(options.port, bodies(NUM_FIRST, stream=True), NUM_FIRST)
        for num_clients, number in zip(options.clients, options.num_requests, strict=True):
            whole = measure_clients(options.port, bodies(number, stream=False), num_clients)
            streams = measure_clients(options.port, bodies(number, stream=True), num_clients)
            figures = {
                "requests_per_s": whole["requests_per_s"], "p50_ms": whole["p50_ms"],
                "streams_per_s": streams["requests_per_s"], "first_text_ms": streams["p50_ms"],
            }  # fmt: skip
            found.append(figures)
            print(f"{server}, {num_clients} clients: {_brief(figures)}", file=sys.stderr, flush=True)
    return found


def _body(request: GenerationRequest, *, stream: bool) -> bytes:
    (image,) = request.images
    assert isinstance(image, bytes)
    return make_body(
        "random", image, request.messages[-1]["content"][-1]["text"], stream=stream, temperature=0.0,
        max_tokens=request.max_new_tokens, ignore_eos=True,
    )  # fmt: skip


@contextlib.contextmanager
def start(server: str, options: argparse.Namespace, model_path: str) -> Iterator[None]:
    """Run a server until it is asked no more."""
    command = _vlmray_command(model_path) if server == "vlmray" else _vllm_command(model_path)
    process = subprocess.Popen(
        [sys.executable, *command, f"--port={options.port}"],
        cwd=ROOT,
        env=without_vlmray(options.num_threads),
        stdout=sys.stderr,
    )
    try:
        _wait(f"http://127.0.0.1:{options.port}/{'ready' if server == 'vlmray' else 'health'}", process)
        yield
    finally:
        process.terminate()
        process.wait(120)


def _vlmray_command(model_path: str) -> list[str]:
    return [
        "jobs/serve.py", "--engine=vllm", f"--model_id={model_path}", "--served_model_name=random",
        "--num_replicas=1", "--log_level=WARNING",
    ]  # fmt: skip


def _vllm_command(model_path: str) -> list[str]:
    """Return the command of vLLM's server with the options that vlmray gives the engine."""
    args = engine_args(
        model_path, EngineConfig(engine="vllm"), on_gpu=False, memory_fraction=1.0, max_adapters=0, max_rank=0
    )
    command = ["-m", "vllm.entrypoints.openai.api_server", "--served-model-name=random"]
    for name, value in args.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            command += [option] if value else []
        else:
            command.append(f"{option}={json.dumps(value) if isinstance(value, dict) else value}")
    return command


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until a server says that it is ready."""
    deadline = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode} before it was ready")
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.5)
    raise SystemExit(f"{url} did not answer within {STARTS_WITHIN_S} s")


def _brief(figures: Figures) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in figures.items())


def print_table(options: argparse.Namespace, rounds: Sequence[dict[str, list[Figures]]]) -> None:
    """Print medians, and of the ratios to vLLM's server also the lowest and highest."""
    print(f"\n{options.repeats} repeats, {options.num_threads} threads, float32, {options.model_id}\n")
    print(f"{'clients':>7}  {'':16} {'vllm':>9} {'vlmray':>9}   {'ratio':>6}  {'lowest':>6} {'highest':>7}")
    report = []
    for place, num_clients in enumerate(options.clients):
        for name in rounds[0]["vllm"][place]:
            values = {server: [each[server][place][name] for each in rounds] for server in SERVERS}
            ratios = [ours / theirs for theirs, ours in zip(values["vllm"], values["vlmray"], strict=True)]
            medians = " ".join(f"{statistics.median(values[server]):9.2f}" for server in SERVERS)
            spread = f"{statistics.median(ratios):6.3f}  {min(ratios):6.3f} {max(ratios):7.3f}"
            print(f"{num_clients:7}  {name:16} {medians}   {spread}")
            report.append({"clients": num_clients, "figure": name, **values, "ratio": ratios})
    print(json.dumps({**vars(options), "figures": report}))


if __name__ == "__main__":
    main()
