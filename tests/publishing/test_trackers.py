"""Figures for trackers, as far as they are installed, offline."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from vlmray.errors import OptionError
from vlmray.publishing.trackers import Figures, TrackerError, check_tracker, report_figures

FIGURES = Figures(
    job="infer", title="A model on charts", options={"model_id": "builtin", "adapter": None, "seed": 0},
    numbers={"exact_match": 0.5, "bars: two/exact_match": 0.25, "cost": None}, texts={"verdict": "better"},
)  # fmt: skip


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(OptionError, match=f"--report_to {name} needs a package: pip install {name}"):
        check_tracker(name)
    check_tracker("none")


def test_nobody_is_told() -> None:
    report_figures("none", FIGURES)


def test_mlflow_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    report_figures("mlflow", FIGURES)
    (run,) = mlflow.search_runs(output_format="list")
    assert run.data.metrics == {"exact_match": 0.5, "bars_ two/exact_match": 0.25}
    assert run.data.params == {"model_id": "builtin", "seed": "0"}
    assert run.data.tags["verdict"] == "better"
    assert run.info.run_name == "A model on charts"


def test_wandb_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    report_figures("wandb", FIGURES)
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    found = written.read_bytes()
    for told in (b"exact_match", b"bars_ two/exact_match", b"verdict", b"better", b"A model on charts"):
        assert told in found
    assert b"cost" not in found


def test_a_tracker_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri("databricks-nowhere://")
    with pytest.raises(TrackerError, match="mlflow did not take the figures"):
        report_figures("mlflow", FIGURES)
