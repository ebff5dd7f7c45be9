"""Models that are compared are asked about the same rows, opened once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.installed import installed_vllm
from vlmray import cluster
from vlmray.benchmark.plan import plan_benchmark
from vlmray.config import BenchmarkConfig


def test_all_models_have_one_source(tmp_path: Path) -> None:
    config = BenchmarkConfig(
        models="one=fake,two=fake", engine="fake", dataset_name="charts?num_rows=4", sample_slices="[1:3]",
        output_dir=str(tmp_path),
    )  # fmt: skip
    one, two = plan_benchmark(config).runs.values()
    assert one.source is two.source
    assert list(one.pending) == list(two.pending) == [1, 2]
    assert one.folder is not two.folder


def test_one_engine_is_chosen_for_all_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the batch size that a benchmark has by itself, which vLLM does not know."""
    monkeypatch.setattr(cluster, "find_gpu_objection", lambda package, log_level: None)
    options: dict[str, Any] = {"dataset_name": "charts?num_rows=4", "sample_slices": "[:2]"}
    models = "one=builtin,two=builtin"
    with installed_vllm(tmp_path / "site"):
        config = BenchmarkConfig(models=models, output_dir=str(tmp_path / "results"), **options)
        found = plan_benchmark(config)
        assert {found.config.engine, *(run.config.engine for run in found.runs.values())} == {"vllm"}
        config = BenchmarkConfig(
            models=models, output_dir=str(tmp_path / "other"), batch_size=4, overwrite=True, **options
        )
        found = plan_benchmark(config)
        assert {found.config.engine, *(run.config.engine for run in found.runs.values())} == {"transformers"}
