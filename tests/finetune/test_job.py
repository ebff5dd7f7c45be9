"""Fine-tuning on Ray Train, end to end: two workers, lost workers, lost drivers, and what is left."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers.paths import ROOT
from helpers.processes import wait_until
from vlmray.config import FinetuneConfig, InferConfig
from vlmray.dataset.sources import open_source
from vlmray.finetune.job import run_finetune
from vlmray.finetune.plan import open_training_data, plan_finetune
from vlmray.finetune.report import format_training_table
from vlmray.finetune.results import TrainingReport
from vlmray.inference.job import run_inference
from vlmray.inference.plan import plan_inference
from vlmray.training.run import TrainingRun
from vlmray.training.worker import train_loop_per_worker

DATASET = "charts?num_rows=400&family=comparison&kind=bar"
HELD_OUT = "charts?num_rows=64&seed=1&family=comparison&kind=bar"


def config_of(model: Path, folder: Path, **options: Any) -> FinetuneConfig:
    return FinetuneConfig(
        **{
            "model_id": str(model), "output_dir": str(folder), "dataset_name": DATASET, "num_workers": 2,
            "max_steps": 30, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "lora_dropout": 0.0,
            "logging_steps": 1, "save_steps": 10,
            **options,
        }
    )  # fmt: skip


def losses(folder: Path) -> dict[int, float]:
    """Loss by step; every step has to be in the history once."""
    history = json.loads((folder / "run.json").read_text())["history"]
    logged = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    assert [step for step, _ in logged] == list(range(1, len(logged) + 1))
    return dict(logged)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that Ray Train has registered, and would go on from."""
    snapshot = folder / "checkpoints" / "checkpoint_manager_snapshot.json"
    return [*folder.glob("checkpoints/checkpoint_*/trainer_state.json")] if snapshot.exists() else []


def train_workers(parent: int) -> list[psutil.Process]:
    processes = psutil.Process(parent).children(recursive=True)
    return [process for process in processes if "ray::RayTrainWorker" in " ".join(_cmdline(process))]


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def trained(
    two_cpus: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FinetuneConfig, Path, TrainingReport]:
    """An undisturbed run of two workers, evaluated."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = config_of(
        tiny_model, folder, eval_split="test", eval_slices="[:24]", eval_steps=30, eval_samples=24,
        max_new_tokens=4, merge_adapter=True,
    )  # fmt: skip
    return config, folder, run_finetune(plan_finetune(config))


def test_the_model_learns(trained: tuple[FinetuneConfig, Path, TrainingReport]) -> None:
    _, folder, report = trained
    loss = losses(folder)
    assert loss[30] < loss[1] / 5
    (_, before), *_, (_, after) = report.curve("eval_exact_match")
    assert before == 0
    assert after >= 0.25


def test_two_workers_train_what_one_would(trained: tuple[FinetuneConfig, Path, TrainingReport]) -> None:
    config, folder, _ = trained
    alone = dataclasses.replace(
        config, per_device_train_batch_size=4, num_workers=1, eval_split=None, eval_slices=None
    )
    data = open_training_data(alone)
    outcome = train_loop_per_worker({"run": TrainingRun.of(alone, data), "data": data})
    expected = {entry["step"]: entry["loss"] for entry in outcome.history if "loss" in entry}
    assert losses(folder) == pytest.approx(expected, abs=1e-3)


def test_what_a_run_leaves(trained: tuple[FinetuneConfig, Path, TrainingReport]) -> None:
    config, folder, report = trained
    assert len(report.checks) == 5
    assert all(check.passed for check in report.checks), report.checks
    record = json.loads((folder / "adapter" / "training.json").read_text())
    assert record["model_id"] == config.model_id
    assert record["dataset_name"] == DATASET
    assert record["num_steps"] == 30
    assert record["targets"]
    assert {entry["step"] for entry in record["history"]} == set(range(31))
    assert (folder / "adapter" / "adapter_config.json").exists()
    assert (folder / "merged" / "model.safetensors").exists()
    assert not [*folder.glob(".*.tmp")]
    assert len(checkpoints(folder)) == config.save_total_limit
    page = (folder / "report.html").read_text()
    assert f"<title>LoRA of {config.model_id} on Built-in charts, 400 rows, train split</title>" in page
    assert page.count("<svg") >= 2
    assert 'src="http' not in page
    table = format_training_table(report)
    assert "120 samples in = 120 trained on + 0 failed" in table
    assert max(map(len, table.splitlines())) <= 80


def test_the_gallery_shows_each_question_with_its_image(
    trained: tuple[FinetuneConfig, Path, TrainingReport],
) -> None:
    _, _, report = trained
    source = open_source(DATASET, "test")
    rows = source.read(range(24))
    assert [item.sample_id for item in report.gallery] == [f"test-{index:06d}" for index in range(24)]
    assert [item.images for item in report.gallery] == [(row["image"],) for row in rows]
    assert [item.question for item in report.gallery] == [row["question"] for row in rows]


def test_inference_takes_the_adapter(
    trained: tuple[FinetuneConfig, Path, TrainingReport], tmp_path: Path
) -> None:
    config, folder, _ = trained
    asked = InferConfig(
        model_id=config.model_id, dataset_name=HELD_OUT, sample_slices="[:]", max_new_tokens=4,
        output_dir=str(tmp_path / "base"), output_format="parquet",
    )  # fmt: skip
    tuned = dataclasses.replace(asked, adapter=str(folder / "adapter"), output_dir=str(tmp_path / "tuned"))
    base_score = run_inference(plan_inference(asked)).score
    tuned_score = run_inference(plan_inference(tuned)).score
    assert base_score is not None
    assert tuned_score is not None
    assert tuned_score >= base_score + 0.25


def test_a_killed_worker_changes_nothing(
    trained: tuple[FinetuneConfig, Path, TrainingReport], tiny_model: Path, tmp_path: Path
) -> None:
    _, undisturbed, _ = trained
    killed: list[int] = []

    def kill_one() -> None:
        wait_until(lambda: checkpoints(tmp_path), timeout_s=200)
        victim = train_workers(os.getpid())[-1]
        victim.kill()
        killed.append(victim.pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    report = run_finetune(plan_finetune(config_of(tiny_model, tmp_path)))
    killer.join()
    assert killed
    assert report.samples_per_s
    assert losses(tmp_path) == pytest.approx(losses(undisturbed), abs=1e-3)


def test_a_killed_driver_is_resumed(
    trained: tuple[FinetuneConfig, Path, TrainingReport], tiny_model: Path, tmp_path: Path
) -> None:
    _, undisturbed, _ = trained
    config = config_of(tiny_model, tmp_path)
    given = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if value is not None and value != getattr(FinetuneConfig(), name)
    }
    command = [sys.executable, str(ROOT / "jobs" / "finetune.py")]
    command += [word for name, value in given.items() for word in (f"--{name}", str(value))]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: checkpoints(tmp_path) or driver.poll() is not None, timeout_s=200)
    finally:
        driver.kill()
    assert driver.wait() == -signal.SIGKILL
    assert not (tmp_path / "run.json").exists()
    with pytest.raises(ValueError, match="--resume"):
        plan_finetune(config)
    report = run_finetune(plan_finetune(dataclasses.replace(config, resume=True)))
    assert report.num_steps == 30
    assert losses(tmp_path) == pytest.approx(losses(undisturbed), abs=1e-3)
