"""Fine-tuning on several nodes: fed without a CPU to spare, and the same losses whoever comes and goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
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

NUM_STEPS = 150
JOB = """
import sys
from vlmray.finetune import job
job._RESIZE_S = 2.0  # machines that come are seen within seconds
from vlmray.cli import main
sys.exit(main(["finetune", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, and two nodes that a worker each nearly fills."""
    with cluster_of({"num_cpus": 2}, {"num_cpus": 2}) as found:
        yield found


@pytest.fixture(scope="module")
def options(tiny_model: Path) -> dict[str, Any]:
    return {
        "model_id": str(tiny_model), "dataset_name": "charts?num_rows=400&family=comparison&kind=bar",
        "max_steps": NUM_STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "lora_dropout": 0.0,
        "logging_steps": 1, "save_steps": 10,
    }  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(options: dict[str, Any]) -> dict[int, float]:
    """The losses of a plain process that trains what two workers of a step would."""
    config = FinetuneConfig(**{**options, "per_device_train_batch_size": 4})
    data = open_training_data(config)
    outcome = train_loop_per_worker({"run": TrainingRun.of(config, data), "data": data})
    return {entry["step"]: entry["loss"] for entry in outcome.history if "loss" in entry}


def start(cluster: Cluster, options: dict[str, Any], told: Path, **more: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", JOB]
    command += [word for name, value in {**options, **more}.items() for word in (f"--{name}", str(value))]
    with told.open("ab") as stderr:
        return subprocess.Popen(
            command, env={**os.environ, **joining(cluster)}, stdout=subprocess.DEVNULL, stderr=stderr
        )


def first_step(folder: Path) -> int:
    """The step of the first checkpoint that Ray Train has registered; 0 before there is one."""
    if not (folder / "checkpoints" / "checkpoint_manager_snapshot.json").exists():
        return 0
    states = folder.glob("checkpoints/checkpoint_*/trainer_state.json")
    return min((json.loads(state.read_text())["global_step"] for state in states), default=0)


def losses(folder: Path) -> dict[int, float]:
    history = json.loads((folder / "run.json").read_text())["history"]
    logged = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    assert [step for step, _ in logged] == list(range(1, NUM_STEPS + 1))
    return dict(logged)


def train_workers() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [each for each in children if "ray::RayTrainWorker" in " ".join(_cmdline(each))]


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_run_shrinks_and_grows_with_the_cluster(
    cluster: Cluster, options: dict[str, Any], undisturbed: dict[int, float], tmp_path: Path
) -> None:
    out, told = tmp_path / "out", tmp_path / "told.txt"
    job = start(cluster, options, told, num_workers="1,2", max_failures=0, output_dir=out)
    try:
        wait_until(lambda: first_step(out) or job.poll() is not None, timeout_s=280)
        lose(cluster, list(cluster.worker_nodes)[-1])
        lost = time.monotonic()
        wait_until(lambda: b"with 1 worker" in told.read_bytes() or job.poll() is not None, timeout_s=280)
        print(f"{time.monotonic() - lost:.1f} s from the loss of a node to the first step without it")
        cluster.add_node(num_cpus=2)
        wait_until(lambda: b"with 2 workers" in told.read_bytes() or job.poll() is not None, timeout_s=280)
        assert job.wait(timeout=280) == 0, told.read_text()
    finally:
        job.kill()
    assert "a machine was lost; starting again from the last checkpoint" in told.read_text()
    assert losses(out) == pytest.approx(undisturbed, abs=1e-3)


def test_a_notice_saves_at_once_and_ctrl_c_leaves_what_resumes(
    cluster: Cluster, options: dict[str, Any], undisturbed: dict[int, float], tmp_path: Path
) -> None:
    out, told = tmp_path / "out", tmp_path / "told.txt"
    more = {"num_workers": 2, "save_steps": 1000, "output_dir": out}
    job = start(cluster, options, told, **more)
    leaving = list(cluster.worker_nodes)[-1]
    try:
        wait_until(lambda: b" 2/150" in told.read_bytes() or job.poll() is not None, timeout_s=280)
        give_notice(cluster, leaving)
        wait_until(lambda: first_step(out) or job.poll() is not None, timeout_s=120)
        assert 0 < first_step(out) < NUM_STEPS
        job.send_signal(signal.SIGINT)
        assert job.wait(timeout=120) == 130, told.read_text()
    finally:
        job.kill()
    assert told.read_text().count("a machine is about to be taken away: saving a checkpoint") == 1
    wait_until(lambda: not train_workers())
    lose(cluster, leaving)
    cluster.add_node(num_cpus=2)
    assert start(cluster, options, told, **more, resume=True).wait(timeout=280) == 0, told.read_text()
    assert losses(out) == pytest.approx(undisturbed, abs=1e-3)


def give_notice(cluster: Cluster, node: Any) -> None:
    """Say that a node will be taken in ten minutes, as the autoscaler does for a cloud."""
    accepted, why = GcsClient(address=cluster.address).drain_node(
        node.node_id,
        autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
        "spot",
        time.time_ns() // 10**6 + 600_000,
    )
    assert accepted, why


def test_what_no_nodes_hold_is_refused_at_once(
    cluster: Cluster, options: dict[str, Any], tmp_path: Path
) -> None:
    told = tmp_path / "told.txt"
    job = start(cluster, options, told, num_workers="5,6", output_dir=tmp_path / "out")
    assert job.wait(timeout=100) == 2
    (line,) = [line for line in told.read_text().splitlines() if line.startswith("error")]
    assert (
        line == "error: --num_workers 5 needs 5 CPUs and the cluster has 4, with no more to start; lower "
        "--num_workers"
    )
    assert not (tmp_path / "out").exists()
