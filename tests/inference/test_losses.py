"""Inference on several nodes, of which machines, replicas and drivers are lost, but no row."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from helpers.clusters import cluster_of, joining, lose
from helpers.processes import descendants, finished, is_alive, parquet_rows, start, wait_until

NODE = {"num_cpus": 2, "num_gpus": 1}
ROWS = ["--engine", "fake", "--sample_slices", "[:]", "--batch_size", "4", "--dataset_name"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and two nodes with a GPU each, if only in name."""
    with cluster_of(NODE, NODE) as nodes, pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in joining(nodes).items():
            monkeypatch.setenv(name, value)
        yield nodes


def replicas() -> list[psutil.Process]:
    return on_these_nodes("_Replica")


def on_these_nodes(title: str) -> list[psutil.Process]:
    """Ray's processes of this title; this process may have a Ray of its own, of other tests, beside them."""
    folder = os.environ["RAY_TMPDIR"]
    raylets = (each.pid for each in descendants("raylet/raylet") if folder in " ".join(each.cmdline()))
    return [process for raylet in raylets for process in descendants(title, raylet)]


def a_replica_is_killed() -> bool:
    """Kill one of them; False if there is none just now, as a row kills them as well and others come."""
    for process in replicas():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            return True
    return False


def generated(log: Path) -> list[str]:
    return log.read_text().split() if log.exists() else []


def test_nodes_leave_and_come_and_a_row_kills_whoever_answers_it(cluster: Cluster, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    model_id = f"fake?latency_s=0.04&crash_on=000150&crash_every_time=1&log={log}"
    job = start(*ROWS, "charts?num_rows=300&seed=1", "--model_id", model_id, "--output_dir", out)
    wait_until(lambda: len(finished(out)) >= 40 or job.poll() is not None, 180)
    lose(cluster, next(iter(cluster.worker_nodes)))
    done, num_generated = finished(out), len(generated(log))
    wait_until(lambda: len(finished(out)) >= 80 or job.poll() is not None, 180)
    cluster.add_node(**NODE)
    wait_until(lambda: len(finished(out)) >= 120 or job.poll() is not None, 180)
    wait_until(a_replica_is_killed, 60)
    _, stderr = job.communicate(timeout=200)
    assert job.returncode == 0, stderr
    rows = parquet_rows(out)
    assert rows.pop("test-000150")["error"] == "the replica died 3 times while answering it"
    assert len(rows) == 299
    assert all(row["prediction"] and row["error"] is None for row in rows.values())
    assert not done & set(generated(log)[num_generated:])


def test_a_driver_that_is_killed_leaves_nothing_but_a_folder_that_resumes(
    cluster: Cluster, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    options = [*ROWS, "charts?num_rows=96&seed=1", "--output_dir", out]
    options += ["--model_id", f"fake?latency_s=0.04&log={log}"]
    for how, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        interrupt(how, code, options, finished(out))
        assert len(generated(log)) == len(set(generated(log)))
        assert not (out / "run.json").exists()
        log.write_text("")
    done = finished(out)
    job = start(*options)
    _, stderr = job.communicate(timeout=200)
    assert job.returncode == 0, stderr
    assert sorted([*done, *generated(log)]) == sorted(parquet_rows(out)) == sorted(finished(out))
    assert len(finished(out)) == 96


def interrupt(how: signal.Signals, code: int, options: list[object], done: set[str]) -> None:
    """Start a job and stop it once it has written more than is done; see that its processes end."""
    out = Path(str(options[options.index("--output_dir") + 1]))
    job = start(*options)
    wait_until(lambda: finished(out) - done or job.poll() is not None, 180)
    left = [*replicas(), *on_these_nodes("Claims")]
    assert left
    job.send_signal(how)
    _, stderr = job.communicate(timeout=60)
    assert job.returncode == code, stderr
    wait_until(lambda: not any(map(is_alive, left)))
