"""What the comparisons with vLLM have in common: their options, and what each process is started with."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from vlmray.cluster.plans import MODEL_ON_CPU

ROOT = Path(__file__).parents[2]

SAME = {
    "RAY_ADDRESS": "local", "RAY_worker_niceness": "0", "PYTHONPATH": str(ROOT), **MODEL_ON_CPU["env_vars"]
}  # fmt: skip
"""Environment of all: what else runs on the machine is to disturb Ray's processes as much as others, and
memory and waiting threads are as vlmray has them for vLLM."""


def same_threads(num_threads: int) -> dict[str, str]:
    """Return the environment in which the model computes on so many cores, and leaves the rest to others."""
    cores = "nobind" if num_threads == os.cpu_count() else f"0-{num_threads - 1}"
    return {**SAME, "VLLM_CPU_OMP_THREADS_BIND": cores}


def without_vlmray(num_threads: int) -> dict[str, str]:
    """Return the environment of a process that starts vLLM itself, threads and memory as vlmray has them."""
    return {
        **os.environ, **same_threads(num_threads), "OMP_NUM_THREADS": str(num_threads),
        "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip


def make_parser(description: str | None, dataset: str | None = None) -> argparse.ArgumentParser:
    """Return a parser of the options that all have.

    Args:
        description: What `--help` begins with.
        dataset: What `--dataset_name` has to be, where not anything will do.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_id", default="random-132m", help="one of benchmarks/common/models.py")
    parser.add_argument("--processor", required=True, help="folder of tokenizer, processor and config")
    parser.add_argument("--dataset_name", required=True, help=dataset)
    return parser
