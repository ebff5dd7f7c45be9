"""A job with vLLM whose process is killed in the middle of a chunk."""

from __future__ import annotations

import os
import subprocess
import uuid
from pathlib import Path

from helpers.processes import command, finished, marked, parquet_rows, wait_until

NUM_ROWS = 400
OPTIONS = {
    "model_id": "builtin", "dataset_name": f"charts?num_rows={NUM_ROWS}", "sample_slices": "[:]",
    "max_new_tokens": 16, "output_format": "both",
}  # fmt: skip


def test_a_killed_engine_is_replaced_and_every_row_is_answered(tmp_path: Path) -> None:
    folder, mark = tmp_path / "results", uuid.uuid4().hex
    options = [part for name, value in OPTIONS.items() for part in (f"--{name}", value)]
    job = subprocess.Popen(
        command("--engine", "vllm", "--output_dir", folder, *options),
        env=os.environ | {"VLMRAY_TEST": mark, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        wait_until(lambda: finished(folder) or job.poll() is not None, 400)
        (core,) = [each for each in marked("VLMRAY_TEST", mark) if "EngineCore" in " ".join(each.cmdline())]
        core.kill()
        said, _ = job.communicate(timeout=400)
    finally:
        job.kill()
    assert job.returncode == 0, said
    rows = parquet_rows(folder)
    assert len(rows) == NUM_ROWS
    assert {row["error"] for row in rows.values()} == {None}
    wait_until(lambda: not marked("VLMRAY_TEST", mark), 60)
