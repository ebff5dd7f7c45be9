"""`--engine openai` against vLLM's own server: all rows, and no finished one again after a kill."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.common.requests import read_requests
from helpers.processes import command, finished, free_port, parquet_rows, wait_until
from vlmray.config import InferConfig
from vlmray.engines import build_engine
from vlmray.models.source import resolve_model_id

NUM_ROWS = 600
DATASET = f"charts?num_rows={NUM_ROWS}"
MAX_NEW_TOKENS = 16


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """vLLM's server with the built-in model."""
    port = free_port()
    arguments = {
        "model": resolve_model_id("builtin"), "served-model-name": "charts", "dtype": "float32", "port": port,
        "generation-config": "vllm", "kv-cache-memory-bytes": 1 << 30,
    }  # fmt: skip
    options = [f"--{name}={value}" for name, value in arguments.items()]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", *options],
        env=os.environ | environment,
    )

    def answers() -> bool:
        assert server.poll() is None, "vLLM's server has ended"
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
            return True
        return False

    try:
        wait_until(answers, 300)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def test_all_rows_are_answered_and_none_twice(endpoint: str, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    options = {
        "engine": "openai", "endpoint": endpoint, "model_id": "charts", "dataset_name": DATASET,
        "sample_slices": "[:]", "max_new_tokens": MAX_NEW_TOKENS, "output_format": "both",
        "output_dir": folder,
    }  # fmt: skip
    asked = command(*(part for name, value in options.items() for part in (f"--{name}", value)))
    environment = os.environ | {"RAY_ADDRESS": "local"}
    job = subprocess.Popen(asked, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: finished(folder) or job.poll() is not None)
    job.kill()
    job.wait(60)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*_out.json")}
    assert 0 < len(before) < NUM_ROWS

    again = subprocess.run(asked, env=environment, capture_output=True, text=True, timeout=400)

    assert again.returncode == 0, again.stdout + again.stderr
    rows = parquet_rows(folder)
    assert len(rows) == NUM_ROWS
    assert not [row["error"] for row in rows.values() if row["error"] is not None]
    assert (
        before.items() <= {path.name: path.stat().st_mtime_ns for path in folder.glob("*_out.json")}.items()
    )
    assert all(row["num_prompt_tokens"] > 0 for row in rows.values())
    same = [rows[name]["prediction"] == text for name, text in answers_of_transformers().items()]
    # vLLM's server resizes images by way of torchvision, so near ties may fall otherwise.
    assert sum(same) >= 0.99 * NUM_ROWS, sum(same)


def answers_of_transformers() -> dict[str, str]:
    """What the built-in model says of the same rows."""
    config = InferConfig(
        model_id="builtin", dataset_name=DATASET, sample_slices="[:]", max_new_tokens=MAX_NEW_TOKENS,
        output_dir="unused",
    )  # fmt: skip
    requests = read_requests(config)
    engine = build_engine(engine="transformers", model_id="builtin")
    completions = engine.generate(requests)
    engine.close()
    return {each.request_id: answer.text for each, answer in zip(requests, completions, strict=True)}
