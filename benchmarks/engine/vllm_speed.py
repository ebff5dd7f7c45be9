"""What does `vlmray infer --engine vllm` cost beside vLLM itself? The same questions, whole jobs, in turn.

    python -m benchmarks.engine.vllm_speed --processor path/to/Qwen2.5-VL-7B-Instruct \\
        --dataset_name path/to/ChartQA --num_rows 300

In an environment that has vLLM. Every turn is a process of its own, with its own start and empty caches:
`chat` has vLLM's `LLM.chat` answer the whole list, with the options that vlmray gives the engine; `infer` is
the job, Ray, reading, scoring and writing included; `ray-data-llm`, where it is among the contenders, is
Ray's own pipeline, which may want another version of vLLM and so another Python. Answers have the lengths of
the labels, whatever the model says. Rates are rows/s from when the model was loaded to the last answer;
`wall` is the whole process.
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
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.forced import environment, write_lengths
from benchmarks.common.models import build_random_model
from benchmarks.common.requests import read_requests
from benchmarks.engine.beside_vllm import ROOT, make_parser, same_threads, without_vlmray
from vlmray.config import EngineConfig, InferConfig
from vlmray.engines.vllm.options import engine_args
from vlmray.models.processors import load_processor
from vlmray.schema import GenerationRequest

CONTENDERS = ("chat", "infer", "ray-data-llm")
Figures = dict[str, Any]


def main() -> None:
    """Measure, and print a table and one JSON line."""
    options = parse_options()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options.model_path = build_random_model(options.model_id, options.processor, folder / "model")
        requests = read_requests(infer_config(options, name), load_processor(options.model_path).tokenizer)
        write_lengths(folder / "lengths.json", requests)
        write_work(options, folder / "work.json", requests)
        turns: dict[str, list[Figures]] = {name: [] for name in options.contenders}
        for repeat in range(options.repeats):
            order = options.contenders if repeat % 2 == 0 else options.contenders[::-1]
            for contender in order:
                turns[contender].append(take_turn(options, contender, folder, repeat))
                print(f"{contender}: {brief(turns[contender][-1])}", file=sys.stderr, flush=True)
    print_table(options, turns, requests)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--num_rows", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num_threads", type=int, default=os.cpu_count())
    parser.add_argument("--engine_options", type=json.loads, default={}, help="of vLLM, for all")
    parser.add_argument("--contenders", nargs="+", default=["chat", "infer"], choices=CONTENDERS)
    parser.add_argument("--ray_data_python", default=sys.executable, help="interpreter for ray-data-llm")
    return parser.parse_args()


def infer_config(options: argparse.Namespace, output_dir: str) -> InferConfig:
    """Describe the run."""
    return InferConfig(
        model_id=options.model_path, dataset_name=options.dataset_name,
        sample_slices=f"[:{options.num_rows}]", output_dir=output_dir, max_new_tokens=64,
    )  # fmt: skip


def write_work(options: argparse.Namespace, path: Path, requests: Sequence[GenerationRequest]) -> None:
    """Write what the ways without vlmray have to do."""
    args = engine_args(
        options.model_path, EngineConfig(engine="vllm", engine_options=options.engine_options),
        on_gpu=False, memory_fraction=1.0, max_adapters=0, max_rank=0,
    )  # fmt: skip
    questions = [
        {
            "text": request.messages[-1]["content"][-1]["text"],
            "image": base64.b64encode(request.images[0]).decode(),  # type: ignore[arg-type]
            "max_tokens": request.max_new_tokens,
        }
        for request in requests
    ]
    path.write_text(json.dumps({"engine_args": args, "questions": questions}))


def take_turn(options: argparse.Namespace, contender: str, folder: Path, repeat: int) -> Figures:
    """Have a contender answer all questions, and return its times."""
    started = time.perf_counter()
    if contender == "infer":
        figures = run_infer(options, folder, folder / f"results-{repeat}")
    else:
        figures = run_way(options, contender, folder)
    return {**figures, "wall_s": time.perf_counter() - started}


def run_infer(options: argparse.Namespace, folder: Path, output_dir: Path) -> Figures:
    """Run the job; its manifest says when the model was there, and when the last answer."""
    arguments = {
        "engine": "vllm", "model_id": options.model_path, "dataset_name": options.dataset_name,
        "sample_slices": f"[:{options.num_rows}]", "max_new_tokens": 64, "output_dir": output_dir,
        "engine_options": json.dumps(options.engine_options), "log_level": "WARNING",
    }  # fmt: skip
    command = [sys.executable, "jobs/infer.py", *(f"--{name}={value}" for name, value in arguments.items())]
    subprocess.run(
        command, cwd=ROOT, check=True, stdout=sys.stderr,
        env={**environment(folder / "lengths.json"), **same_threads(options.num_threads)},
    )  # fmt: skip
    manifest = json.loads((output_dir / "run.json").read_text())
    load_s = manifest["stages_s"]["load"]
    answers = sorted(output_dir.glob("*_out.json"))
    return {
        "load_s": load_s,
        "answer_s": manifest["summary"]["usage"]["held_s"] - load_s,
        "texts": [json.loads(path.read_text())["prediction"] for path in answers],
    }


def run_way(options: argparse.Namespace, contender: str, folder: Path) -> Figures:
    """Run a process that answers without vlmray, threads and memory as there."""
    python = options.ray_data_python if contender == "ray-data-llm" else sys.executable
    found = subprocess.run(
        [python, "-m", "benchmarks.engine.vllm_ways", contender, str(folder / "work.json")],
        cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
        env=without_vlmray(options.num_threads),
    )  # fmt: skip
    return dict(json.loads(found.stdout.splitlines()[-1]))


def brief(figures: Figures) -> str:
    """Say times in a line."""
    return ", ".join(f"{name} {figures[name]:.1f}" for name in ("load_s", "answer_s", "wall_s"))


def print_table(
    options: argparse.Namespace, turns: dict[str, list[Figures]], requests: Sequence[GenerationRequest]
) -> None:
    """Print medians with their spread, and how each compares with the first."""
    first = turns[options.contenders[0]]
    print(f"\n{options.num_rows} rows, {options.repeats} repeats, {options.num_threads} threads, float32\n")
    heads = ("rows/s", "lowest", "highest", "ratio", "load s", "wall s", "wall ratio", "same answers")
    print(f"{'':14} " + " ".join(f"{head:>12}" for head in heads))
    report: dict[str, Any] = {}
    for name, figures in turns.items():
        rates = [options.num_rows / each["answer_s"] for each in figures]
        ratios = [one["answer_s"] / each["answer_s"] for one, each in zip(first, figures, strict=True)]
        walls = [one["wall_s"] / each["wall_s"] for one, each in zip(first, figures, strict=True)]
        same = sum(a == b for a, b in zip(first[0]["texts"], figures[0]["texts"], strict=True))
        times = {key: [each[key] for each in figures] for key in ("load_s", "answer_s", "wall_s")}
        load_s, _, wall_s = map(statistics.median, times.values())
        cells = (
            statistics.median(rates), min(rates), max(rates), statistics.median(ratios), load_s, wall_s,
            statistics.median(walls), same,
        )  # fmt: skip
        print(f"{name:14} " + " ".join(f"{cell:12.3f}" for cell in cells))
        report[name] = {
            "rows_per_s": rates, "ratio": ratios, "wall_ratio": walls, "same_answers": same, **times
        }  # fmt: skip
    num_tokens = sum(request.max_new_tokens for request in requests)
    print(json.dumps({**vars(options), "num_answer_tokens": num_tokens, "contenders": report}))


if __name__ == "__main__":
    main()
