"""What was measured is taken up again by the same command, and by no other."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlmray.benchmark.plan import Benchmark, plan_benchmark
from vlmray.benchmark.speed import SpeedPoint, read_speed, to_measure, write_speed
from vlmray.config import BenchmarkConfig, InferConfig
from vlmray.inference.plan import plan_inference

POINT = SpeedPoint(
    model="base", load=4, kind="requests in flight", num_requests=8, num_failed=1, requests_per_s=2.5,
    tokens_per_s=20.0, ttft_ms=None, latency_ms=(1.0, 2.0, 3.0),
)  # fmt: skip


def _plan(folder: Path, **options: Any) -> Benchmark:
    defaults = {
        "models": "base=fake", "engine": "fake", "dataset_name": "charts?num_rows=4", "concurrency": "1,4",
        "speed_samples": 8,
    }  # fmt: skip
    return plan_benchmark(BenchmarkConfig(**{**defaults, "output_dir": str(folder), **options}))


def test_what_was_measured_is_measured_once(tmp_path: Path) -> None:
    assert read_speed(_plan(tmp_path)) == []
    write_speed(_plan(tmp_path), [POINT])
    found = read_speed(_plan(tmp_path, price_per_hour=2.0))
    assert found == [POINT]
    assert to_measure(_plan(tmp_path), ["base"], found) == [(1, "base")]
    assert read_speed(_plan(tmp_path, speed_samples=9)) == []
    assert read_speed(_plan(tmp_path, offline=True)) == []
    assert read_speed(_plan(tmp_path)) == [POINT]  # nothing was deleted by looking
    assert read_speed(_plan(tmp_path, overwrite=True)) == []
    assert read_speed(_plan(tmp_path)) == []


def test_a_model_under_the_same_name_is_measured_again_once_it_is_another(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    options = {"engine": "transformers", "models": f"base={model}"}
    write_speed(_plan(tmp_path / "out", **options), [POINT])
    assert read_speed(_plan(tmp_path / "out", **options)) == [POINT]
    with (model / "chat_template.jinja").open("a") as file:
        file.write(" ")
    assert read_speed(_plan(tmp_path / "out", **options)) == []


def test_a_damaged_measurement_is_named(tmp_path: Path) -> None:
    benchmark = _plan(tmp_path)
    write_speed(benchmark, [replace(POINT, ttft_ms=(1.0, 1.5, 2.0))])
    text = (tmp_path / "speed.json").read_text()
    (tmp_path / "speed.json").write_text(text[:-9])
    with pytest.raises(ValueError, match=r"speed.json is damaged \(.+\); delete it to have speed measured a"):
        read_speed(benchmark)


def test_the_folder_of_another_job_is_refused(tmp_path: Path) -> None:
    plan_inference(
        InferConfig(
            engine="fake", model_id="fake", dataset_name="charts", sample_slices="[:4]",
            output_dir=str(tmp_path),
        )
    )  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"holds another run \(job was 'infer', now 'benchmark'\)"):
            _plan(tmp_path, overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before
