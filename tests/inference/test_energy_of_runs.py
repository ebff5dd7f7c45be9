"""A run on a card whose driver counts what it takes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.clusters import cluster_of, joining
from helpers.nvml import Card, write_nvml
from helpers.processes import run

WATTS = 400


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """That of jobs on a node with one card: Ray has it in name, and its driver is a stand-in."""
    folder = write_nvml(tmp_path_factory.mktemp("nvml"), Card("GPU-a", watts=WATTS))
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", path)
        with cluster_of({"num_cpus": 2, "num_gpus": 1}) as cluster:
            yield joining(cluster)


def test_report_record_and_terminal_say_what_the_gpus_took(
    environment: dict[str, str], tmp_path: Path
) -> None:
    done = run(
        "--engine", "fake", "--model_id", "fake?latency_s=0.02",
        "--dataset_name", "charts?num_rows=32&seed=1", "--sample_slices", "[:]", "--batch_size", 4,
        "--num_replicas", 2, "--gpus_per_replica", 0.5, "--output_dir", tmp_path, **environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run.json").read_text())["summary"]
    usage = summary["usage"]
    assert 0 < usage["energy_kwh"] * 3.6e6 / WATTS <= summary["elapsed_s"]
    assert usage["energy_of_1000_wh"] == pytest.approx(usage["energy_kwh"] * 1e6 / 32)
    kwh, wh = (f"{usage[name]:,.4g}" for name in ("energy_kwh", "energy_of_1000_wh"))
    assert f"{kwh} kWh taken by the GPUs, {wh} Wh for 1,000 answers" in done.stdout
    page = (tmp_path / "report.html").read_text()
    assert "kWh taken by the GPUs" in page
    assert kwh in page
    assert wh in page
