"""Models that draw several answers are compared by their majority, through a server and offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from vlmray.benchmark.job import run_benchmark
from vlmray.benchmark.passing.figures import benchmark_figures
from vlmray.benchmark.plan import plan_benchmark
from vlmray.benchmark.report import format_markdown, format_results
from vlmray.benchmark.verdicts import Results
from vlmray.builtin.models import BUILTIN
from vlmray.config import BenchmarkConfig
from vlmray.metrics import majority

pytestmark = pytest.mark.usefixtures("two_cpus")
CHARTS = "charts?num_rows=24&kind=bar&style=plain&seed=92&questions_per_image=2"
SEVERAL = "several"


def run(folder: Path, models: str, **options: Any) -> tuple[Results, BenchmarkConfig]:
    config = BenchmarkConfig(
        models=models, dataset_name=CHARTS, speed_samples=0, num_samples=4, temperature=1.5,
        output_dir=str(folder), max_new_tokens=16, metrics="exact_match", **options,
    )  # fmt: skip
    return run_benchmark(plan_benchmark(config)), config


def predictions(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of each model by sample id."""
    rows = pq.read_table(folder / "predictions.parquet").to_pylist()
    return {
        model: {row["sample_id"]: row for row in rows if row["model"] == model}
        for model in {row["model"] for row in rows}
    }


@pytest.mark.parametrize("offline", [False, True])
def test_the_built_in_model_draws_several_answers(tmp_path: Path, offline: bool) -> None:
    models = f"one={BUILTIN}@num_samples=1,{SEVERAL}={BUILTIN}"
    results, config = run(tmp_path, models, engine="transformers", dtype="float32", offline=offline)
    found = predictions(tmp_path)
    for name, row in found[SEVERAL].items():
        place, agreement = majority(row["samples"])
        assert (row["prediction"], row["agreement"]) == (row["samples"][place], agreement)
        assert row["exact_match"] == row["sample_scores"][place]
        assert len(row["samples"]) == 4
        one = found["one"][name]
        assert one["prediction"] == row["samples"][0]  # as if it had been alone
        assert (one["samples"], one["sample_scores"], one["agreement"]) == (None, None, None)
    assert min(row["agreement"] for row in found[SEVERAL].values()) < 1  # each is drawn by itself
    (drawn,) = results.drawn
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["drawn"][SEVERAL] == json.loads(json.dumps(drawn.to_json()))
    assert drawn.majority is not None
    assert results.board is not None
    assert drawn.majority.mean == results.board.score(SEVERAL, "exact_match").mean  # by which it is compared
    draws = [row["sample_scores"] for row in found[SEVERAL].values()]
    assert drawn.passes[1].mean == pytest.approx(sum(map(sum, draws)) / 4 / len(draws))
    assert drawn.passes[4].mean == pytest.approx(sum(map(max, draws)) / len(draws))
    page, markdown = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "Drawn 4 times" in page
    assert f"| measure | {SEVERAL} |" in markdown
    assert all(f"| {name} | " in markdown for name in ("agreement", "majority vote", "pass@1", "pass@4"))
    assert markdown == format_markdown(results) + "\n"
    assert f"{SEVERAL}, 4 draws: agreement" in format_results(results)
    assert benchmark_figures(config, results).numbers[f"{SEVERAL}/pass_at_4"] == drawn.passes[4].mean


def test_what_a_server_draws_does_not_depend_on_how_many_are_asked_at_a_time(tmp_path: Path) -> None:
    """Nor does a row get another one's draws, in whatever order they come."""
    for load in ("1", "8"):
        run(tmp_path / load, "a=fake?latency_s=0.002", engine="fake", concurrency=load)
    one, eight = (predictions(tmp_path / load)["a"] for load in ("1", "8"))
    assert {name: row["samples"] for name, row in one.items()} == {
        name: row["samples"] for name, row in eight.items()
    }
    assert len({text for row in one.values() for text in row["samples"]}) == 24 * 4
