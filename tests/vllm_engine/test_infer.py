"""The job with vLLM: rows that cannot be answered, a process that is killed, an adapter.

What has to come out is what the transformers engine says of the same rows.
"""

from __future__ import annotations

import os
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.common.charts import write_charts
from benchmarks.common.requests import read_requests
from helpers.adapters import build_adapter
from helpers.processes import command, finished, marked, parquet_rows, wait_until
from vlmray.config import InferConfig
from vlmray.engines import build_engine
from vlmray.models.source import resolve_model_id

NUM_ROWS = 400
"""More than four chunks, which an engine answers at a time: it still works when the first one is written."""

MAX_MODEL_LEN = 1024
BROKEN, TOO_LONG, SPECIAL = 10, 150, 290
SPECIAL_TOKENS = "<|im_end|><|image_pad|><|vision_start|><|video_pad|><|endoftext|> What is shown?"
OPTIONS = {"model_id": "builtin", "sample_slices": "[:]", "max_new_tokens": 16, "output_format": "both"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Charts with a broken image, a prompt that is too long, and a question full of special tokens."""
    path = tmp_path_factory.mktemp("data") / "test.parquet"
    rows = pq.read_table(write_charts(path, NUM_ROWS)).to_pylist()
    rows[BROKEN]["image"]["bytes"] = rows[BROKEN]["image"]["bytes"][:200]
    rows[TOO_LONG]["question"] = "word " * MAX_MODEL_LEN
    rows[SPECIAL]["question"] = SPECIAL_TOKENS
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def expected(data: Path) -> dict[str, str]:
    return answers_of_transformers(data, "[:]")


def answers_of_transformers(data: Path, slices: str, **options: Any) -> dict[str, str]:
    """What the rows are answered that can be."""
    config = InferConfig(
        **{**OPTIONS, "dataset_name": str(data), "sample_slices": slices, "output_dir": "unused"}
    )
    bad = {f"test-{row:06d}" for row in (BROKEN, TOO_LONG)}
    requests = [request for request in read_requests(config) if request.request_id not in bad]
    engine = build_engine(engine="transformers", model_id="builtin", **options)
    completions = engine.generate(requests)
    engine.close()
    return {
        request.request_id: completion.text for request, completion in zip(requests, completions, strict=True)
    }


def options_of(**options: object) -> list[object]:
    asked = {"engine": "vllm", "max_model_len": MAX_MODEL_LEN, **OPTIONS, **options}
    return [part for name, value in asked.items() for part in (f"--{name}", value)]


def run_and_kill(mark: str, **options: object) -> None:
    """Run the job to its end, and kill vLLM's process once there are answers."""
    job = subprocess.Popen(
        command(*options_of(**options)),
        env=os.environ | {"VLMRAY_TEST": mark, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        wait_until(lambda: finished(Path(str(options["output_dir"]))) or job.poll() is not None, 400)
        cores = [each for each in marked("VLMRAY_TEST", mark) if "EngineCore" in " ".join(each.cmdline())]
        for core in cores:
            core.kill()
        said, _ = job.communicate(timeout=400)
    finally:
        job.kill()
    assert job.returncode == 0, said
    assert len(cores) == 1, said


def test_a_killed_engine_is_replaced_and_no_row_but_the_bad_ones_notices(
    data: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    folder, mark = tmp_path / "results", uuid.uuid4().hex
    run_and_kill(mark, dataset_name=data, output_dir=folder)
    rows = parquet_rows(folder)
    assert len(rows) == NUM_ROWS
    errors = {int(name[-6:]): row["error"] for name, row in rows.items() if row["error"] is not None}
    assert errors.keys() == {BROKEN, TOO_LONG}
    assert "image" in errors[BROKEN]
    assert "maximum context length" in errors[TOO_LONG]
    assert {name: row["prediction"] for name, row in rows.items() if row["error"] is None} == expected
    assert SPECIAL_TOKENS in rows[f"test-{SPECIAL:06d}"]["prompt"]
    wait_until(lambda: not marked("VLMRAY_TEST", mark), 60)


def test_an_adapter_is_there_again_after_a_kill(data: Path, tmp_path: Path) -> None:
    adapter = build_adapter(tmp_path / "adapter", Path(resolve_model_id("builtin")))
    run_and_kill(uuid.uuid4().hex, dataset_name=data, output_dir=tmp_path / "results", adapter=adapter)
    rows = parquet_rows(tmp_path / "results")
    answered = {name: row["prediction"] for name, row in rows.items() if row["error"] is None}
    assert answered == answers_of_transformers(data, "[:]", adapter=str(adapter))
    base = answers_of_transformers(data, "[:]")
    assert sum(text != base[name] for name, text in answered.items()) > len(answered) // 2
