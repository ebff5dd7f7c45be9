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
def test_the_demo_compares_the_same_rows_without_and_with_the_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = DemoConfig(num_charts=4, max_steps=4, output_dir=str(tmp_path))
    report = run_demo(config)
    board = report.board
    assert board.groups("family") == sorted(FAMILIES)
    rows = {}
    for model in ("base", "tuned"):
        rows[model] = pq.read_table(tmp_path / "comparison" / model / "predictions").to_pylist()
        assert len(rows[model]) == 4 * len(FAMILIES)
        for family in FAMILIES:
            scores = [row["score"] for row in rows[model] if row["family"] == family]
            found = board.score(model, "exact_match", "family", family)
            assert (found.num_samples, found.mean) == (4, pytest.approx(sum(scores) / 4))
    base = {row["sample_id"]: row["score"] for row in rows["base"]}
    changes = [row["score"] - base[row["sample_id"]] for row in rows["tuned"]]
    assert report.results.galleries["fixed"][0] == sum(change > 0 for change in changes)
    assert report.results.galleries["broken"][0] == sum(change < 0 for change in changes)
    page = (tmp_path / "report.html").read_text()
    assert "<dt>base</dt>" in page
    assert "data:image/" in page
    for folder in ("lora", "comparison"):
        assert f'href="{folder}/report.html"' in page
        assert (tmp_path / folder / "report.html").is_file()
    assert capsys.readouterr().out.count("/2  ") == 2
    record = json.loads((tmp_path / "lora" / "adapter" / "training.json").read_text())
    assert record["options"]["model_id"] == "builtin"
    assert "seed=2026" in record["dataset_name"]
    assert record["dataset_split"] == "train"

    manifests = [tmp_path / "comparison" / model / "run.json" for model in ("base", "tuned")]
    before = [manifest.read_text() for manifest in manifests]
    again = run_demo(config)  # nothing is answered or trained anew
    assert again.board == board
    assert again.training.train_loss == report.training.train_loss
    assert again.training.eval_score == report.training.eval_score
    assert [manifest.read_text() for manifest in manifests] == before


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(ValueError, match=r"--family 'sum' is unknown; known: count, .*list"):
        run_demo(DemoConfig(family="sum"))
