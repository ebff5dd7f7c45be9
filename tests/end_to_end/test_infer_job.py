"""`jobs/infer.py` as people run it: a process of its own, killed, interrupted, submitted, misused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from helpers.paths import ROOT
from helpers.processes import descendants, finished, free_port, is_alive, parquet_rows, run, start, wait_until

SLICE = ROOT.parent / "shared" / "data" / "chartqa"
FAKE = ["--engine", "fake", "--dataset_name", "charts?num_rows=96&seed=3", "--sample_slices", "[:]"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = run(*FAKE, "--model_id", "fake", "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    return {name: row["prediction"] for name, row in parquet_rows(folder).items()}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_resumes(
    tmp_path: Path, uninterrupted: dict[str, object], how: signal.Signals
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    options = [*FAKE, "--model_id", f"fake?latency_s=0.05&log={log}", "--output_dir", out, "--batch_size", 2]
    job = start(*options)
    wait_until(lambda: len(finished(out)) >= 8 or job.poll() is not None)
    replicas = descendants("_Replica", job.pid)
    job.send_signal(how)
    _, stderr = job.communicate(timeout=30)
    # The workers notice within moments; what they still write counts as finished.
    wait_until(lambda: not any(map(is_alive, replicas)))
    if how != signal.SIGKILL:
        assert job.returncode == 130
        assert "the same command resumes" in stderr
        assert "Traceback" not in stderr
    kept = finished(out)
    assert 8 <= len(kept) < 96
    assert not (out / "run.json").exists()
    if how == signal.SIGTERM:
        return  # from here on it is what SIGINT left
    log.write_text("")
    again = run(*options)
    assert again.returncode == 0, again.stderr
    generated = Counter(log.read_text().split())
    assert not kept & generated.keys()
    assert set(generated.values()) == {1}
    assert {name: row["prediction"] for name, row in parquet_rows(out).items()} == uninterrupted
    assert (out / "run.json").exists()
    assert not list(out.glob(".*.tmp"))


def test_kill_9_of_the_replica_loses_and_repeats_nothing(
    tmp_path: Path, uninterrupted: dict[str, object]
) -> None:
    out = tmp_path / "out"
    job = start(*FAKE, "--model_id", "fake?latency_s=0.05", "--output_dir", out, "--batch_size", "2")
    wait_until(lambda: len(finished(out)) >= 8 or job.poll() is not None)
    (replica,) = descendants("_Replica", job.pid)
    replica.kill()
    _, stderr = job.communicate(timeout=200)
    assert job.returncode == 0, stderr
    assert {name: row["prediction"] for name, row in parquet_rows(out).items()} == uninterrupted


@pytest.mark.skipif(not SLICE.is_dir(), reason="the real ChartQA slice is not here")
def test_real_chartqa_through_the_tiny_model(tmp_path: Path) -> None:
    done = run(
        "--model_id", "tiny-random", "--dataset_name", SLICE, "--dataset_split", "test",
        "--sample_slices", "[:12]", "--max_new_tokens", "4", "--output_dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "12 rows in = 12 answered + 0 failed" in done.stdout
    assert {row["metric"] for row in parquet_rows(tmp_path).values()} == {"relaxed_accuracy"}
    assert all(row["prediction"] is not None for row in parquet_rows(tmp_path).values())


def test_the_defaults_run_from_a_local_hub_cache(tmp_path: Path, tiny_model: Path) -> None:
    """No option but the required one, network off: Qwen2.5-VL-7B and ChartQA come from the hub cache."""
    model = cache_repository(tmp_path, "models--Qwen--Qwen2.5-VL-7B-Instruct")
    shutil.copytree(tiny_model, model, dirs_exist_ok=True)
    dataset = cache_repository(tmp_path, "datasets--HuggingFaceM4--ChartQA")
    write_chartqa(dataset / "data" / "test-00000-of-00001.parquet")
    done = run("--sample_slices", "[0:8]", cwd=tmp_path, HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    assert "8 rows in = 8 answered + 0 failed" in done.stdout
    rows = parquet_rows(tmp_path / "outputs" / "vlm")
    assert sorted(rows) == [f"test-{index:06d}" for index in range(8)]
    assert {row["family"] for row in rows.values()} <= {"human", "augmented"}


def cache_repository(home: Path, name: str) -> Path:
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = home / "hf" / "hub" / name
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    return snapshot


def write_chartqa(path: Path) -> None:
    """The first rows of the real slice where it is, else charts in the same columns."""
    import datasets

    from vlmray.builtin.charts import ChartDataset, parse_charts_name

    path.parent.mkdir(parents=True)
    if SLICE.is_dir():
        pq.write_table(pq.read_table(next((SLICE / "data").glob("test-*.parquet"))).slice(0, 20), path)
        return
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "query": datasets.Value("string"),
            "label": datasets.List(datasets.Value("string")),
            "human_or_machine": datasets.ClassLabel(names=["human", "machine"]),
        }
    )
    charts = ChartDataset(parse_charts_name("charts?num_rows=20"), "test")
    rows = [
        {"image": {"bytes": row["image"], "path": None}, "query": row["question"], "label": row["answers"],
         "human_or_machine": 0}
        for row in charts
    ]  # fmt: skip
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)


@pytest.fixture
def cluster() -> Iterator[str]:
    """A cluster as `ray start --head` makes it, with token authentication and one GPU, if only in name."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # socket paths below it have to be short
    jobs, agent = free_port(), free_port()  # Ray's default ports may be another cluster's
    head = subprocess.Popen(
        [
            ray_executable(), "start", "--head", "--block", "--num-cpus", "1", "--num-gpus", "1",
            "--port", str(free_port()), "--dashboard-port", str(jobs),
            "--dashboard-agent-listen-port", str(agent), "--temp-dir", folder, "--disable-usage-stats",
        ],
        env={**os.environ, "RAY_AUTH_MODE": "token"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        wait_until(lambda: head.poll() is not None or (answers(jobs) and answers(agent)))
        assert head.poll() is None
        yield f"http://127.0.0.1:{jobs}"
    finally:
        for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
            process.kill()
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def ray_executable() -> str:
    return str(Path(sys.executable).parent / "ray")


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_ray_job_submit_runs_it_on_a_cluster(tmp_path: Path, cluster: str) -> None:
    done = subprocess.run(
        [
            ray_executable(), "job", "submit", "--address", cluster, "--working-dir", str(ROOT), "--",
            sys.executable, "jobs/infer.py", *FAKE, "--model_id", "fake", "--output_dir", str(tmp_path),
        ],
        env={**os.environ, "RAY_AUTH_MODE": "token"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (job,) = set(re.findall(r"raysubmit_\w+", done.stdout))
    status = subprocess.run(
        [ray_executable(), "job", "status", "--address", cluster, job],
        env={**os.environ, "RAY_AUTH_MODE": "token"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "SUCCEEDED" in (status.stdout + status.stderr).upper()
    assert len(parquet_rows(tmp_path)) == 96
    assert json.loads((tmp_path / "run.json").read_text())["summary"]["num_answered"] == 96


def test_installed_wheel_needs_no_repository(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy: building leaves folders behind
    shutil.copytree(ROOT / "vlmray", source / "vlmray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    install = "pip install --quiet --no-index --no-deps --no-build-isolation --disable-pip-version-check"
    built = subprocess.run(
        [sys.executable, "-m", *install.split(), "--target", tmp_path / "site", source],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    # Templates travel with the code only if the package says so.
    code = (
        "from vlmray import cli; from vlmray.reports import page; from vlmray.serving.http import app;"
        "from vlmray.builtin.models import trained_charts; from vlmray.metrics import EVALUATE_PATH;"
        "from pathlib import Path; trained_charts(); assert list(Path(EVALUATE_PATH).glob('*.py'));"
        "fact = page.Fact(label='l', value='v'); page.render_page(page.Page(title='t', headline=fact));"
        "app._read_page(); print(cli.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout
    assert (tmp_path / "site" / "bin" / "vlmray").exists()
