"""How much does vLLM's prefix cache have, of rows in their order and of the same rows shuffled?

    python -m benchmarks.engine.vllm_cache --processor path/to/Qwen2.5-VL-7B-Instruct \\
        --data path/to/chartqa/data/test-00000-of-00001.parquet

In an environment that has vLLM. Each is a job, `vlmray infer --engine vllm`; what is printed is what its
run.json says.
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

import pyarrow.parquet as pq

from benchmarks.common.models import build_random_model
from benchmarks.engine.vllm_speed import ROOT


def main() -> None:
    """Run both jobs, and print what their caches had."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_id", default="random-132m", help="one of benchmarks/common/models.py")
    parser.add_argument("--processor", required=True, help="folder of tokenizer, processor and config")
    parser.add_argument("--data", type=Path, required=True, help="a Parquet file")
    parser.add_argument("--num_rows", type=int, default=600)
    parser.add_argument("--num_replicas", default="1")
    parser.add_argument("--engine_options", default="{}", help="of vLLM, as a JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build_random_model(options.model_id, options.processor, folder / "model")
        table = pq.read_table(options.data)[: options.num_rows]
        order = random.Random(0).sample(range(len(table)), len(table))
        shares = {}
        for title, rows in (("natural", table), ("shuffled", table.take(order))):
            pq.write_table(rows, folder / f"{title}.parquet")
            shares[title] = run(options, model, folder / f"{title}.parquet", folder / title)
            print(f"{title:10} {shares[title]:.1%}", flush=True)
    apart = shares["natural"] - shares["shuffled"]
    print(f"{'apart':10} {100 * apart:.1f} points")
    print(json.dumps({**vars(options), "data": str(options.data), "cached_share": shares}))


def run(options: argparse.Namespace, model: str, data: Path, output_dir: Path) -> float:
    """Run a job, and return the share of prompt tokens that was cached."""
    arguments = {
        "engine": "vllm", "model_id": model, "dataset_name": data, "sample_slices": "[:]",
        "max_new_tokens": 2, "output_dir": output_dir, "engine_options": options.engine_options,
        "num_replicas": options.num_replicas, "log_level": "WARNING",
    }  # fmt: skip
    subprocess.run(
        [sys.executable, "jobs/infer.py", *(f"--{name}={value}" for name, value in arguments.items())],
        cwd=ROOT, check=True, stdout=sys.stderr,
        env={**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return float(json.loads((output_dir / "run.json").read_text())["summary"]["usage"]["cached_share"])


if __name__ == "__main__":
    main()
