"""Fine-tuning on several nodes: fed without a CPU to spare, and the same losses whoever comes and goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from helpers.clusters import cluster_of, joining, lose
from helpers.processes import wait_until
from vlmray.config import FinetuneConfig
from vlmray.finetune.plan import open_training_data
from vlmray.training.run import TrainingRun
from vlmray.training.worker import train_loop_per_worker

ENDLESS = 10**6
JOB = """
import sys
from vlmray.finetune import job
job._RESIZE_S = 2.0  # machines that come are seen as soon as Ray Train knows of them
from vlmray.cli import main
main(["finetune", *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, and two nodes that a worker each nearly fills."""
    with cluster_of({"num_cpus": 2}, {"num_cpus": 2}) as found:
        yield found


@pytest.fixture(scope="module")
def options(tiny_model: Path) -> dict[str, Any]:
    """Two workers or one; a learning rate that does not depend on how many steps there will be."""
    return {
        "model_id": str(tiny_model), "dataset_name": "charts?num_rows=400&family=comparison&kind=bar",
        "num_workers": "1,2", "per_device_train_batch_size": 2, "lora_dropout": 0.0, "learning_rate": 5e-4,
        "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "logging_steps": 1, "save_total_limit": 1000,
    }  # fmt: skip


def assert_undisturbed(history: list[dict[str, Any]], options: dict[str, Any]) -> None:
    """The losses are those of a plain process that trains what two workers would."""
    found = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    alone = {"num_workers": None, "per_device_train_batch_size": 4, "max_steps": len(found)}
    config = FinetuneConfig(**{**options, **alone})
    data = open_training_data(config)
    outcome = train_loop_per_worker({"run": TrainingRun.of(config, data), "data": data})
    expected = {entry["step"]: entry["loss"] for entry in outcome.history if "loss" in entry}
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, abs=1e-3)


def start(cluster: Cluster, options: dict[str, Any], told: Path, **more: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", JOB]
    command += [word for name, value in {**options, **more}.items() for word in (f"--{name}", str(value))]
    with told.open("ab") as stderr:
        return subprocess.Popen(
            command, env={**os.environ, **joining(cluster)}, stdout=subprocess.DEVNULL, stderr=stderr
        )


def read(told: Path) -> str:
    return told.read_text(errors="replace")  # a bar may be half written


def saved(folder: Path) -> dict[str, Any]:
    """What the trainer knew at the last checkpoint that Ray Train has registered."""
    try:
        snapshot = json.loads((folder / "checkpoints" / "checkpoint_manager_snapshot.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # not there yet, or being written
        return {"global_step": 0}
    last = max(each["checkpoint_dir_name"] for each in snapshot["checkpoint_results"])
    return json.loads((folder / "checkpoints" / last / "trainer_state.json").read_text())


def train_workers() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [each for each in children if "ray::RayTrainWorker" in " ".join(_cmdline(each))]


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_what_no_nodes_hold_is_refused_at_once(
    cluster: Cluster, options: dict[str, Any], tmp_path: Path
) -> None:
    told = tmp_path / "told.txt"
    job = start(cluster, {**options, "num_workers": "5,6"}, told, output_dir=tmp_path / "out")
    assert job.wait(timeout=100) == 2
    (line,) = [line for line in read(told).splitlines() if line.startswith("error")]
    assert (
        line == "error: --num_workers 5 needs 5 CPUs and the cluster has 4, with no more to start; lower "
        "--num_workers"
    )
    assert not (tmp_path / "out").exists()


def test_a_run_shrinks_and_grows_with_the_cluster(
    cluster: Cluster, options: dict[str, Any], tmp_path: Path
) -> None:
    out, told = tmp_path / "out", tmp_path / "told.txt"
    more = {"save_steps": 5, "max_steps": ENDLESS, "max_failures": 0, "output_dir": out}
    job = start(cluster, options, told, **more)

    def wait(condition: Callable[[], object]) -> None:
        wait_until(lambda: condition() or job.poll() is not None, timeout_s=400)
        assert job.poll() is None, read(told)

    try:
        wait(lambda: saved(out)["global_step"])
        lose(cluster, next(iter(cluster.worker_nodes)))
        lost = time.monotonic()
        wait(lambda: "with 1 worker" in read(told))
        print(f"{time.monotonic() - lost:.1f} s from the loss of a node to the first step without it")
        cluster.add_node(num_cpus=2)
        wait(lambda: "with 2 workers" in read(told))
        grown = saved(out)["global_step"]
        wait(lambda: saved(out)["global_step"] >= grown + 10)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=120) == 130, read(told)
    finally:
        job.kill()
    assert "a machine was lost; starting again from the last checkpoint" in read(told)
    wait_until(lambda: not train_workers())
    assert_undisturbed(saved(out)["log_history"], options)


def test_a_notice_saves_at_once_and_what_was_interrupted_resumes_on_fewer(
    cluster: Cluster, options: dict[str, Any], tmp_path: Path
) -> None:
    """Ray Train reserves nodes for an elastic run for minutes after it was interrupted: two clusters."""
    out, told = tmp_path / "out", tmp_path / "told.txt"
    more = {"save_steps": ENDLESS, "output_dir": out, "max_steps": 60}
    job = start(cluster, {**options, "num_workers": 2}, told, **more)
    try:
        wait_until(lambda: len(train_workers()) == 2 or job.poll() is not None, timeout_s=400)
        give_notice(cluster, next(iter(cluster.worker_nodes)))
        wait_until(lambda: saved(out)["global_step"] or job.poll() is not None, timeout_s=120)
        job.send_signal(signal.SIGINT)
        assert job.wait(timeout=120) == 130, read(told)
    finally:
        job.kill()
    assert 0 < saved(out)["global_step"] < 60
    assert read(told).count("a machine is about to be taken away: saving a checkpoint") == 1
    wait_until(lambda: not train_workers())
    with cluster_of({"num_cpus": 1}) as smaller:
        resumed = start(smaller, options, told, **more, resume=True)
        assert resumed.wait(timeout=400) == 0, read(told)
    assert "with 1 worker" in read(told)
    assert_undisturbed(json.loads((out / "run.json").read_text())["history"], options)


def give_notice(cluster: Cluster, node: Any) -> None:
    """Say that a node will be taken in ten minutes, as the autoscaler does for a cloud."""
    accepted, why = GcsClient(address=cluster.address).drain_node(
        node.node_id,
        autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
        "spot",
        time.time_ns() // 10**6 + 600_000,
    )
    assert accepted, why
