"""Several answers to each row on a real Ray: the same however the work is cut, lost or resumed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from vlmray.config import InferConfig
from vlmray.inference.job import describe, run_inference
from vlmray.inference.plan import InferenceRun, plan_inference
from vlmray.inference.summary import Summary

pytestmark = pytest.mark.usefixtures("two_cpus")


def planned(folder: Path, **options: Any) -> InferenceRun:
    defaults = {
        "engine": "fake", "model_id": "fake", "dataset_name": "charts?num_rows=48&seed=3",
        "sample_slices": "[:]", "output_dir": str(folder), "batch_size": 8, "num_samples": 3,
        "temperature": 1.0,
    }  # fmt: skip
    return plan_inference(InferConfig(**{**defaults, **options}))


def infer(folder: Path, **options: Any) -> Summary:
    return run_inference(planned(folder, **options))


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["sample_id"]: row for row in pq.read_table(folder / "predictions").to_pylist()}


@pytest.fixture(scope="module")
def whole(two_cpus: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    infer(folder)
    return folder


def test_files_parquet_and_manifest_have_the_draws(whole: Path) -> None:
    rows = rows_of(whole)
    assert len({text for row in rows.values() for text in row["samples"]}) == 48 * 3
    for name, row in rows.items():
        assert json.loads((whole / f"{name}_out.json").read_text()) == row
        assert (len(row["samples"]), len(row["sample_scores"])) == (3, 3)
    drawn = json.loads((whole / "run.json").read_text())["summary"]["drawn"]
    assert drawn["agreement"] == pytest.approx(1 / 3)
    assert [*drawn["passes"]] == ["1", "2", "3"]
    assert "Drawn 3 times" in (whole / "report.html").read_text()


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"num_replicas": "2", "batch_size": 64}], ids=str)
def test_draws_do_not_depend_on_how_the_work_is_cut(
    options: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    infer(tmp_path, **options)
    assert rows_of(tmp_path) == rows_of(whole)


def test_the_first_draw_is_what_a_run_with_one_says(whole: Path, tmp_path: Path) -> None:
    infer(tmp_path, num_samples=1)
    assert {name: row["prediction"] for name, row in rows_of(tmp_path).items()} == {
        name: row["samples"][0] for name, row in rows_of(whole).items()
    }


def test_a_replica_that_dies_between_the_draws_of_a_row_changes_none(whole: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    infer(tmp_path / "out", model_id=f"fake?crash_on=000021%231&log={log}")
    assert Path(f"{log}.crashed").exists()
    assert rows_of(tmp_path / "out") == rows_of(whole)


def test_a_run_that_goes_on_draws_what_is_missing(whole: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = {"model_id": f"fake?log={log}"}
    infer(tmp_path / "out", sample_slices="[:20]", **options)
    ((_, text), *_) = describe(planned(tmp_path / "out", **options))
    assert text == "48: 20 answered already, 28 to answer, 3 times each"
    infer(tmp_path / "out", **options)
    asked = Counter(log.read_text().split())
    assert (len(asked), set(asked.values())) == (48 * 3, {1})
    assert rows_of(tmp_path / "out") == rows_of(whole)
