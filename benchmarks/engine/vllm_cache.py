"""What does vLLM's cache have of prompts whose rows were shuffled? The same rows in two orders, as jobs.

    python -m benchmarks.engine.vllm_cache --processor path/to/Qwen2.5-VL-7B-Instruct \\
        --dataset_name path/to/ChartQA/data/test-00000-of-00001.parquet

In an environment that has vLLM. `natural` is a Parquet file as it is, `shuffled` the same with its rows in a
random order. The share is that of all prompt tokens which vLLM had cached, whatever from: what all prompts
begin with counts in both.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.common.models import build_random_model
from benchmarks.engine.beside_vllm import ROOT, SAME, make_parser


def main() -> None:
    """Measure, and print a table and one JSON line."""
    parser = make_parser(__doc__, "a Parquet file")
    parser.add_argument("--num_rows", type=int, default=600)
    parser.add_argument("--num_replicas", type=int, default=1)
    parser.add_argument("--engine_options", default="{}", help="of vLLM")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options.model_path = build_random_model(options.model_id, options.processor, folder / "model")
        rows = pq.read_table(options.dataset_name).slice(0, options.num_rows)
        order = random.Random(options.seed).sample(range(len(rows)), len(rows))
        found = {}
        for what, table in {"natural": rows, "shuffled": rows.take(order)}.items():
            pq.write_table(table, folder / f"{what}.parquet")
            found[what] = run(options, folder / f"{what}.parquet", folder / what)
            print(f"{what}: {found[what]}", file=sys.stderr, flush=True)
    print(f"\n{options.num_rows} rows, {options.num_replicas} replica(s), {options.model_id}\n")
    print(f"{'':10} {'prompt tokens cached':>20} {'rows/s':>8}")
    for what, figures in found.items():
        print(f"{what:10} {100 * figures['cached_share']:18.1f} % {figures['rows_per_s']:8.2f}")
    print(json.dumps({**vars(options), "orders": found}))


def run(options: argparse.Namespace, dataset: Path, output_dir: Path) -> dict[str, Any]:
    """Run the job, and return what its manifest says."""
    arguments = {
        "engine": "vllm", "model_id": options.model_path, "dataset_name": dataset, "sample_slices": "[:]",
        "max_new_tokens": 4, "output_dir": output_dir, "engine_options": options.engine_options,
        "num_replicas": options.num_replicas, "log_level": "WARNING",
    }  # fmt: skip
    command = [sys.executable, "jobs/infer.py", *(f"--{name}={value}" for name, value in arguments.items())]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr, env={**os.environ, **SAME})
    manifest = json.loads((output_dir / "run.json").read_text())
    usage = manifest["summary"]["usage"]
    answer_s = usage["held_s"] / options.num_replicas - manifest["stages_s"]["load"]
    return {"cached_share": usage["cached_share"], "rows_per_s": options.num_rows / answer_s}


if __name__ == "__main__":
    main()
