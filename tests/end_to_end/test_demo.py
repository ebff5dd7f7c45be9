"""The demo tells its story with numbers that the result files bear out."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from vlmray.builtin.questions import FAMILIES
from vlmray.config import DemoConfig
from vlmray.demo.job import run_demo


@pytest.mark.usefixtures("two_cpus")
def test_the_demo_compares_the_same_rows_before_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = DemoConfig(num_charts=4, max_steps=4, output_dir=str(tmp_path))
    report = run_demo(config)
    assert [gain.num_rows for gain in report.comparison.families] == [4] * len(FAMILIES)
    for folder, shares in (("base", "before"), ("tuned", "after")):
        rows = pq.read_table(tmp_path / folder / "predictions").to_pylist()
        right = sum(row["score"] for row in rows)
        assert len(rows) == 4 * len(FAMILIES)
        assert getattr(report.comparison.total, shares) == pytest.approx(right / len(rows))
    page = (tmp_path / "report.html").read_text()
    assert "Without LoRA" in page
    assert "data:image/" in page
    assert capsys.readouterr().out.count("/3  ") == 3
    record = json.loads((tmp_path / "lora" / "adapter" / "training.json").read_text())
    assert record["options"]["model_id"] == "builtin"
    assert "seed=2026" in record["dataset_name"]

    again = run_demo(config)  # nothing is answered or trained anew
    assert again.comparison == report.comparison
    assert json.loads((tmp_path / "base" / "run.json").read_text())["summary"]["num_resumed"] == 4 * len(
        FAMILIES
    )


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(ValueError, match=r"--family 'sum' is unknown; known: count, .*list"):
        run_demo(DemoConfig(family="sum"))
