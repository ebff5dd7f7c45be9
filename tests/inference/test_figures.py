"""What trackers are told of runs and comparisons."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmray.benchmark.job import run_benchmark
from vlmray.benchmark.passing.figures import benchmark_figures
from vlmray.benchmark.plan import plan_benchmark
from vlmray.config import BenchmarkConfig, InferConfig
from vlmray.inference.job import run_inference
from vlmray.inference.passing.figures import run_figures
from vlmray.inference.plan import plan_inference
from vlmray.publishing.trackers import Figures

CHARTS = "charts?num_rows=24&questions_per_image=2"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Figures]:
    """What a tracker that is there gets."""
    found: list[Figures] = []
    for module in ("vlmray.inference.passing", "vlmray.benchmark.job"):
        monkeypatch.setattr(f"{module}.report_figures", lambda _, figures: found.append(figures))
    for module in ("vlmray.inference.plan", "vlmray.benchmark.plan"):
        monkeypatch.setattr(f"{module}.check_tracker", lambda _: None)
    return found


def test_of_a_run(two_cpus: None, told: list[Figures], tmp_path: Path) -> None:
    config = InferConfig(
        model_id="fake", engine="fake", dataset_name=CHARTS, sample_slices="[:]", report_to="wandb",
        output_dir=str(tmp_path),
    )  # fmt: skip
    run = plan_inference(config)
    summary = run_inference(run)
    (figures,) = told
    assert figures == run_figures(run, summary)
    numbers = figures.numbers
    assert numbers["num_rows"] == numbers["num_answered"] == 24
    assert numbers["exact_match_low"] <= numbers["exact_match"] <= numbers["exact_match_high"]
    assert numbers["num_prompt_tokens"] > 0
    assert numbers["samples_per_s"] > 0
    assert numbers["held_s"] >= numbers["used_s"] > 0


def test_of_a_comparison(two_cpus: None, told: list[Figures], tmp_path: Path) -> None:
    config = BenchmarkConfig(
        models="base=fake,tuned=fake", engine="fake", dataset_name=CHARTS, offline=True, report_to="mlflow",
        output_dir=str(tmp_path / "out"), speed_samples=0,
    )  # fmt: skip
    results = run_benchmark(plan_benchmark(config))
    assert told == [benchmark_figures(config, results)]
    numbers = told[0].numbers
    assert numbers["tuned/exact_match_difference"] == 0
    assert numbers["base/exact_match_low"] <= numbers["base/exact_match"]
    assert numbers["base/num_failed"] == 0
    assert "no significant change" in told[0].texts["verdict"]
