"""`jobs/infer.py` as a process of its own, and what it leaves in its output folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]


def command(*options: object) -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / "infer.py"), *map(str, options)]


def run(*options: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **env}
    return subprocess.run(command(*options), cwd=cwd, env=env, capture_output=True, text=True, timeout=280)


def start(*options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(command(*options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition: Callable[[], object], timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def finished(folder: Path) -> set[str]:
    """Ids of the samples whose files are complete."""
    return {path.name.removesuffix("_out.json") for path in folder.glob("*_out.json")}


def parquet_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Result rows by sample id; each has to be there once."""
    rows = pq.read_table(folder / "predictions").to_pylist()
    assert set(Counter(row["sample_id"] for row in rows).values()) == {1}
    return {row["sample_id"]: row for row in rows}
