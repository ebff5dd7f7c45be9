"""Models that are compared are asked about the same rows, opened once."""

from __future__ import annotations

from pathlib import Path

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
