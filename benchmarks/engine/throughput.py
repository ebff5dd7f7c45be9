"""How close does the engine come to what the machine can do? The same requests in several ways, and a limit.

    python -m benchmarks.engine.throughput
    python -m benchmarks.engine.throughput --model_id random-132m \\
        --processor path/to/Qwen2.5-VL-7B-Instruct --dataset_name path/to/ChartQA --num_rows 48 --forced

(a) one sample after the other through transformers' `generate`; (b) `generate` on fixed batches, padded, as
evaluation harnesses do; (c) the engine of vlmray; (d) the whole pipeline with it, reading and writing
included; (e) vLLM, where `--vllm_python` names a Python that has it. All see the rows in the order of the
dataset, in one precision, in turn, `--repeats` times after a turn that is not counted. (a), (b), (c) and (e)
have a process each, which loads the model once; (d) counts from its first third of finished rows to its
last, so it leaves out the start of Ray and the loading of the model.

"A repeated row" is what a further question about an image costs the engine, as a share of the first question
about one: it answers the first questions alone, too.

The limit is the floating-point work that cannot be avoided (`benchmarks/common/limit.py` has the formula)
over the rate of this machine's matrix products in the same run.

`random-132m`, `random-3b` and `random-7b` are Qwen2.5-VL of that size with random weights and the tokenizer
and image processor of `--processor`. `--forced` gives each answer as many tokens as the first accepted answer
has, whatever the model says.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.limit import measure_products
from benchmarks.common.models import RANDOM, build_random_model
from benchmarks.common.requests import read_requests
from vlmray.config import InferConfig
from vlmray.models.processors import load_processor
from vlmray.models.source import resolve_model_id

ROOT = Path(__file__).parents[2]


class Way:
    """A process that answers all requests when it is its turn."""

    def __init__(self, name: str, work: Path, python: str, num_threads: int) -> None:
        self.name = name
        self.seconds: list[float] = []
        self.peak_gib = 0.0
        self.texts: list[str] = []
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.engine.ways", name, str(work)],
            cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env={**os.environ, "OMP_NUM_THREADS": str(num_threads)},
        )  # fmt: skip

    def turn(self, *, counts: bool) -> None:
        """Answer all requests."""
        reply = self.ask("go")
        self.texts, self.peak_gib = reply["texts"], reply["peak_gib"]
        if counts:
            self.seconds.append(reply["seconds"])

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line and return the reply."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        reply = self._process.stdout.readline()
        if not reply:
            raise SystemExit(f"{self.name} failed; see above")
        return dict(json.loads(reply))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def main() -> None:
    """Measure, and print a table and one JSON line."""
    options = parse_options()
    with tempfile.TemporaryDirectory() as folder:
        if options.model_id in RANDOM:
            options.model_id = build_random_model(
                options.model_id, options.processor, Path(folder) / "model", options.dtype
            )
        work = write_work(options, Path(folder))
        names = ["one by one", "fixed batches", "engine", *(["vllm"] if options.vllm_python else [])]
        ways = [
            Way(name, work, options.vllm_python if name == "vllm" else sys.executable, options.num_threads)
            for name in names
        ]
        products, pipeline, repeated = [], [], []
        for way in ways:
            way.turn(counts=False)  # sets things up
        for repeat in range(options.repeats):
            products.append(measure_products(options.device, options.dtype))
            for way in ways:
                way.turn(counts=True)
            repeated += cost_of_repeated(ways[2], ways[2].ask("first"))
            if options.pipeline:
                pipeline.append(run_pipeline(options, f"{folder}/{repeat}"))
        gflop = ways[2].ask("count")["gflop"]
        for way in ways:
            way.close()
    rates = {way.name: [options.num_rows / seconds for seconds in way.seconds] for way in ways}
    if pipeline:
        rates["pipeline"] = pipeline
    rates["limit"] = [options.num_rows / (gflop * 1e9 / product) for product in products]
    print_table(options, rates, ways, gflop, products, repeated)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model_id", default="builtin", help=f"a model, or {', '.join(RANDOM)}")
    parser.add_argument("--processor", help="folder of tokenizer, processor and config, for random weights")
    parser.add_argument(
        "--dataset_name", default="charts?kind=bar&style=plain&num_rows=512&questions_per_image=4&seed=3"
    )
    parser.add_argument("--dataset_split", default="test")
    parser.add_argument("--num_rows", type=int, default=256)
    parser.add_argument("--max_new_tokens", type=int, default=16)
    parser.add_argument("--forced", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch_size", type=int, default=64, help="of the engine, at most")
    parser.add_argument("--fixed_batch_size", type=int, default=8, help="of (b)")
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pipeline", action="store_true", help="measure (d) too; not with --forced")
    parser.add_argument("--vllm_python", help="a Python that has vLLM, to measure (e) too")
    options = parser.parse_args()
    if options.model_id in RANDOM and not options.processor:
        parser.error(f"--model_id {options.model_id} needs --processor")
    if options.forced and options.pipeline:
        parser.error("--pipeline answers as the model does, --forced does not")
    options.dtype = "bfloat16" if options.device == "cuda" else "float32"
    return options


def cost_of_repeated(engine: Way, first: dict[str, Any]) -> list[float]:
    """Return what a further question costs as a share of a first one, or nothing where there is none."""
    num_first = len(first["texts"])
    num_more = len(engine.texts) - num_first
    if not num_more:
        return []
    return [(engine.seconds[-1] - first["seconds"]) / num_more / (first["seconds"] / num_first)]


def infer_config(options: argparse.Namespace, output_dir: str) -> InferConfig:
    """Describe the run of the pipeline."""
    return InferConfig(
        model_id=options.model_id, dataset_name=options.dataset_name, dataset_split=options.dataset_split,
        sample_slices=f"[:{options.num_rows}]", output_dir=output_dir, dtype=options.dtype,
        max_new_tokens=options.max_new_tokens, batch_size=options.batch_size, output_format="parquet",
        log_level="ERROR",
    )  # fmt: skip


def run_pipeline(options: argparse.Namespace, output_dir: str) -> float:
    """Return the rate of the pipeline; Ray is there only meanwhile, and not needed for the other ways."""
    import ray

    from benchmarks.pipeline.overhead import measure_pipeline
    from vlmray import cluster
    from vlmray.inference.plan import plan_inference

    cluster.connect("ERROR")
    try:
        run = plan_inference(infer_config(options, output_dir))
        return measure_pipeline(run, cluster.plan_replicas(None, None))
    finally:
        ray.shutdown()


def write_work(options: argparse.Namespace, folder: Path) -> Path:
    """Write what the ways have to do."""
    config = infer_config(options, f"{folder}/unused")
    processor = load_processor(resolve_model_id(options.model_id))
    requests = read_requests(config, processor.tokenizer if options.forced else None)
    questions = [
        {
            "prompt": processor.apply_chat_template(request.messages, add_generation_prompt=True),
            "messages": list(request.messages),
            "images": [base64.b64encode(image).decode() for image in request.images],
            "max_new_tokens": request.max_new_tokens,
        }
        for request in requests
    ]
    path = folder / "work.json"
    work = {**vars(options), "model_id": str(resolve_model_id(options.model_id)), "questions": questions}
    path.write_text(json.dumps(work))
    return path


def print_table(
    options: argparse.Namespace,
    rates: dict[str, list[float]],
    ways: Sequence[Way],
    gflop: float,
    products: Sequence[float],
    repeated: Sequence[float],
) -> None:
    """Print medians with their spread, and how the engine compares."""
    peaks = {way.name: way.peak_gib for way in ways if way.name != "vllm"}  # its model is elsewhere
    equal = {
        way.name: sum(one == other for one, other in zip(way.texts, ways[2].texts, strict=True))
        for way in ways
    }
    print(
        f"\n{options.num_rows} rows, {options.repeats} repeats, {options.device}, {options.dtype}, "
        f"{options.num_threads} threads\n"
    )
    print(
        f"{'samples/s':14} {'median':>8} {'lowest':>8} {'highest':>8} {'engine / it':>12} "
        f"{'peak GiB':>9} {'same answers':>13}"
    )
    ratios = {}
    for name, values in rates.items():
        ratio = [one / other for one, other in zip(rates["engine"], values, strict=True)]
        ratios[name] = statistics.median(ratio)
        peak = f"{peaks[name]:.2f}" if name in peaks else ""
        more = f"{peak:>9} {equal[name]:13}" if name in equal else ""
        print(
            f"{name:14} {statistics.median(values):8.2f} {min(values):8.2f} {max(values):8.2f} "
            f"{ratios[name]:12.2f} {more}"
        )
    rate = statistics.median(products) / 1e9
    print(f"\n{gflop:.0f} GFLOP at {rate:.0f} GFLOP/s")
    if repeated:
        print(
            f"a repeated row: {statistics.median(repeated):.3f} ({min(repeated):.3f} to {max(repeated):.3f})"
        )
    figures = {
        "samples_per_s": rates, "ratio": ratios, "peak_gib": peaks, "equal": equal, "gflop": gflop,
        "repeated": repeated,
    }  # fmt: skip
    print(json.dumps({**vars(options), **figures}))


if __name__ == "__main__":
    main()
