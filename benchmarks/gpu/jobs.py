"""The four jobs on Ray, by their command lines: do they run on a GPU, and what does Ray cost there?"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from benchmarks.gpu.setting import Figures, Setting
from benchmarks.pipeline.overhead import measure_engine, measure_pipeline, read_requests
from benchmarks.serving import measure_rows, read_samples
from vlmray import cluster
from vlmray.benchmark.asking import free_port
from vlmray.builtin.models import BUILTIN_FOLDER
from vlmray.config import InferConfig
from vlmray.engines import build_engine
from vlmray.engines.fake import build_tiny_random_adapter
from vlmray.inference.plan import plan_inference

ROOT = Path(__file__).parents[2]
CHARTS = "charts?kind=bar&style=plain&num_rows=64&questions_per_image=4&seed=3"
_CLIENTS = (1, 8, 32)
_NUM_STEPS = 10


def pipeline(setting: Setting) -> Figures:
    """Put the same rows through the bare engine and through the pipeline on Ray."""
    config = InferConfig(
        model_id=setting.model_folder(setting.scale.large), dataset_name=setting.dataset_name,
        sample_slices=f"[:{setting.scale.num_piped}]", output_dir=_output(setting, "pipeline"),
        max_new_tokens=8, batch_size=setting.scale.num_piped // 4, max_pixels=setting.scale.max_pixels,
    )  # fmt: skip
    run = plan_inference(config)
    requests = read_requests(run)
    engine = build_engine(
        engine="transformers", model_id=config.model_id, batch_size=config.batch_size,
        max_pixels=config.max_pixels,
    )  # fmt: skip
    engine.generate(requests[: config.batch_size])
    bare = measure_engine(engine, requests, config.batch_size)
    engine.close()
    yield "bare_engine_rows_per_s", bare
    cluster.connect("ERROR")
    piped = measure_pipeline(run, cluster.plan_replicas(None, None))
    yield "pipeline_rows_per_s", piped
    yield "share_of_bare_engine", piped / bare


def infer(setting: Setting) -> Figures:
    """Answer rows with two replicas, on a GPU on half of it each."""
    output = _output(setting, "infer")
    shared = ["--gpus_per_replica", 0.5] if setting.device == "cuda" else []
    _run(
        "infer", "--model_id", setting.model_folder(setting.scale.large), "--dataset_name",
        setting.dataset_name, "--sample_slices", f"[:{setting.scale.num_piped}]", "--max_new_tokens", 8,
        "--num_replicas", 2, *shared, "--batch_size", 16, "--output_dir", output, *_pixel_limit(setting),
    )  # fmt: skip
    record = json.loads((Path(output) / "run.json").read_text())
    summary = record["summary"]
    yield "num_answered", summary["num_answered"]
    yield "num_failed", summary["num_failed"]
    yield "rows_per_s_with_start", summary["num_answered"] / summary["elapsed_s"]
    yield from (record["overlap"] or {}).items()
    if summary["usage"]["energy_kwh"] is not None:
        yield "energy_kwh", summary["usage"]["energy_kwh"]
    if summary["num_answered"] != setting.scale.num_piped:
        raise RuntimeError(f"{setting.scale.num_piped} rows in, {summary['num_answered']} answered")


def finetune(setting: Setting) -> Figures:
    """Train ten steps, kill the worker at a checkpoint, and see that all ten come out."""
    output = Path(_output(setting, "finetune"))
    command = _command(
        "finetune", "--model_id", "builtin", "--dataset_name", "charts?num_rows=40&kind=bar&style=plain",
        "--max_steps", _NUM_STEPS, "--save_steps", 2, "--logging_steps", 1, "--num_workers", 1,
        "--per_device_train_batch_size", 4, "--output_dir", output,
    )  # fmt: skip
    snapshot = output / "checkpoints" / "checkpoint_manager_snapshot.json"
    started = time.perf_counter()
    with _started(command) as job:
        _wait(lambda: snapshot.exists() or job.poll() is not None, "a checkpoint", setting)
        worker = _find_worker(job)
        worker.kill()
        yield "killed_worker_after_s", time.perf_counter() - started
        if job.wait() != 0:
            raise RuntimeError(f"exit code {job.returncode} after a worker was killed")
    yield "elapsed_s", time.perf_counter() - started
    history = json.loads((output / "run.json").read_text())["history"]
    steps = [entry["step"] for entry in history if "loss" in entry]
    yield "steps_logged", len(steps)
    if steps != list(range(1, _NUM_STEPS + 1)):
        raise RuntimeError(f"logged steps are {steps}")


def serve(setting: Setting) -> Figures:
    """Ask a server from 1, 8 and 32 clients, for whole answers and for streams."""
    port = free_port()
    options = argparse.Namespace(
        model_id="served",
        dataset_name=setting.dataset_name,
        dataset_split="test",
        max_new_tokens=8,
        port=port,
    )
    rows = read_samples(options)
    command = _command(
        "serve", "--model_id", setting.model_folder(setting.scale.large), "--served_model_name", "served",
        "--max_new_tokens", options.max_new_tokens, "--max_batch_size", 32, "--num_replicas", 1,
        "--port", port, *_pixel_limit(setting),
    )  # fmt: skip
    started = time.perf_counter()
    with _started(command) as job:
        _wait(lambda: _answers(port) or job.poll() is not None, "the server", setting)
        yield "ready_s", time.perf_counter() - started
        for clients in _CLIENTS:
            num_requests = max(4, setting.scale.num_requests * clients // max(_CLIENTS))
            whole = measure_rows(options, rows, clients, num_requests, stream=False)
            streams = measure_rows(options, rows, clients, num_requests, stream=True)
            yield f"{clients}_clients_requests_per_s", whole["requests_per_s"]
            yield f"{clients}_clients_p50_ms", whole["p50_ms"]
            yield f"{clients}_clients_ttft_p50_ms", streams["p50_ms"]
        job.send_signal(signal.SIGINT)
        yield "exit_code_after_ctrl_c", job.wait(timeout=60)


def benchmark(setting: Setting) -> Figures:
    """Compare the built-in model with a random adapter on it, by answers and by speed."""
    output = Path(_output(setting, "benchmark"))
    adapter = build_tiny_random_adapter(Path(setting.scratch) / "adapter", BUILTIN_FOLDER)
    _run(
        "benchmark", "--models", f"base=builtin,other=builtin+{adapter}", "--dataset_name", CHARTS,
        "--max_new_tokens", 16,
        "--concurrency", 8, "--speed_samples", 16, "--output_dir", output,
    )  # fmt: skip
    results = json.loads((output / "results.json").read_text())
    yield "verdicts", results["verdicts"]
    yield "num_samples", results["dataset"]["num_samples"]


def _pixel_limit(setting: Setting) -> list[object]:
    limit = setting.scale.max_pixels
    return [] if limit is None else ["--max_pixels", limit]


def _output(setting: Setting, name: str) -> str:
    return str(Path(setting.scratch) / name)


def _command(job: str, *options: object) -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *map(str, options)]


def _run(job: str, *options: object) -> None:
    done = subprocess.run(_command(job, *options), cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    print(done.stderr)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise RuntimeError(f"jobs/{job}.py ended with exit code {done.returncode}: {last}")


@contextlib.contextmanager
def _started(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a job meanwhile; end it where it did not end by itself."""
    job = subprocess.Popen(command, cwd=ROOT)
    try:
        yield job
    finally:
        if job.poll() is None:
            job.terminate()
            job.wait()


def _find_worker(job: subprocess.Popen[bytes]) -> psutil.Process:
    """Return the training worker of a job."""
    if job.poll() is not None:
        raise RuntimeError(f"the job ended with exit code {job.returncode} before its worker was killed")
    for process in psutil.Process(job.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ray::RayTrainWorker" in " ".join(process.cmdline()):
                return process
    raise RuntimeError("no training worker found")


def _wait(condition: Callable[[], object], what: str, setting: Setting) -> None:
    timeout_s = 110 * setting.scale.patience
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {timeout_s:.0f} s for {what} in vain")
        time.sleep(0.05)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as reply:
            return bool(reply.status == 200)
    except (OSError, urllib.error.URLError):
        return False
