"""Answering a dataset under fire: each row is answered once, and none that was finished again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pyarrow.parquet as pq


class Answering:
    """`jobs/infer.py` with the fake engine, which takes its time and writes down whom it answers.

    Args:
        folder: Where rows, answers and logs go.
        num_rows: Rows of the dataset.
        latency_s: Seconds that each row takes.
    """

    name = "infer"
    titles: ClassVar[dict[str, str]] = {"replica": "_Replica"}

    def __init__(self, folder: Path, num_rows: int = 1200, latency_s: float = 0.05) -> None:
        folder.mkdir()
        self.log = folder / "driver.log"
        self._num_rows = num_rows
        self._output, self._asked = folder / "answers", folder / "asked.log"
        self._asked.touch()
        self._marks: list[tuple[set[str], int]] = []
        rows = ({"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(num_rows))
        data = folder / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self._options = [
            "--engine", "fake", "--model_id", f"fake?latency_s={latency_s}&log={self._asked}",
            "--dataset_name", str(data), "--image_column", "none", "--sample_slices", "[:]",
            "--batch_size", "16", "--num_replicas", "2", "--output_dir", str(self._output),
        ]  # fmt: skip

    def options(self, num_starts: int) -> Sequence[str]:
        return self._options

    def progress(self) -> int:
        return self._asked.stat().st_size

    def has_served(self) -> bool:
        return False  # its driver ends by itself

    def before_kill(self) -> None:
        finished = {path.name.removesuffix("_out.json") for path in self._output.rglob("*_out.json")}
        self._marks.append((finished, self._asked.stat().st_size))

    def findings(self) -> dict[str, float]:
        log = self._asked.read_bytes()
        again = {name for finished, size in self._marks for name in finished & {*log[size:].decode().split()}}
        asked = Counter(log.decode().split())
        rows = [
            row
            for path in sorted(self._output.glob("predictions/*.parquet"))
            for row in pq.read_table(path).to_pylist()
        ]
        answered = Counter(row["sample_id"] for row in rows if row["error"] is None)
        return {
            "rows": self._num_rows,
            "lost": self._num_rows - len(answered),
            "doubled": len(rows) - len({row["sample_id"] for row in rows}),
            "finished_generated_again": len(again),
            "unfinished_generated_again": asked.total() - len(asked) - len(again),
            "half_written": len([*self._output.rglob(".*.tmp")]),
        }
