"""`--engine openai` against vLLM's own server."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from benchmarks.common.charts import write_charts
from benchmarks.common.requests import read_requests
from helpers.processes import command, finished, free_port, parquet_rows, wait_until
from vlmray.config import InferConfig
from vlmray.engines import build_engine
from vlmray.models.source import resolve_model_id

NUM_ROWS = 600
OPTIONS = {"model_id": "builtin", "sample_slices": "[:]", "max_new_tokens": 16, "output_format": "both"}


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """vLLM's server with the built-in model, in float32 and greedy where nothing else is asked for."""
    port = free_port()
    server = subprocess.Popen(
        [
            # As `vllm serve`, which asks for the package by a name that its build for CPUs has not.
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model",
            resolve_model_id("builtin"), "--dtype=float32", "--enforce-eager", "--generation-config=vllm",
            "--served-model-name=builtin", f"--port={port}",
            "--enable-prompt-tokens-details", "--limit-mm-per-prompt={\"video\": 0}",
        ],
        stdout=(tmp_path / "server.log").open("wb"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        wait_until(lambda: is_ready(port) or server.poll() is not None, 300)
        assert server.poll() is None, (tmp_path / "server.log").read_text()
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def is_ready(port: int) -> bool:

    with contextlib.suppress(OSError):
        urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
        return True
    return False


def test_all_rows_are_answered_in_two_goes_as_by_a_model_here(url: str, tmp_path: Path) -> None:
    data, folder = write_charts(tmp_path / "test.parquet", NUM_ROWS), tmp_path / "results"
    asked = {"engine": "openai", "endpoint": url, "dataset_name": data, "output_dir": folder, **OPTIONS}
    job = command(*(part for name, value in asked.items() for part in (f"--{name}", value)))
    with subprocess.Popen(job, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        try:
            wait_until(lambda: finished(folder) or first.poll() is not None)
        finally:
            first.kill()
    num_left = NUM_ROWS - len(finished(folder))
    assert num_left > 0
    again = subprocess.run(job, capture_output=True, text=True, timeout=280)
    assert again.returncode == 0, again.stdout + again.stderr
    rows = parquet_rows(folder)
    assert len(rows) == NUM_ROWS
    assert {row["error"] for row in rows.values()} == {None}
    summary = json.loads((folder / "run.json").read_text())["summary"]
    assert summary["num_resumed"] >= NUM_ROWS - num_left > 0
    assert 0 < summary["usage"]["cached_share"] < 1
    engine = build_engine(engine="transformers", model_id="builtin")
    config = InferConfig(**{**OPTIONS, "dataset_name": data, "output_dir": "unused"})
    requests = read_requests(config)
    expected = [completion.text for completion in engine.generate(requests)]
    found = [rows[request.request_id]["prediction"] for request in requests]
    same = sum(one == other for one, other in zip(found, expected, strict=True))
    assert same >= 0.99 * NUM_ROWS, same  # vLLM's server resizes images by way of torchvision
