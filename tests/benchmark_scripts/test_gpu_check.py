"""The GPU check as it runs on CPUs: every step works, and what fails or hangs stops nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.gpu.__main__ import Turn, format_table, remove_left_behind, take_steps
from benchmarks.gpu.setting import SCALES, Setting
from benchmarks.gpu.steps import AIMS, STEPS, Step
from helpers.paths import ROOT
from helpers.processes import wait_until
from vlmray.builtin.models import BUILTIN_FOLDER

LEFT_OUT_ON_CPUS = {"train-8bit": "needs a GPU", "train-flash": "no flash_attn here", "vllm": "no vllm here"}

pytestmark = pytest.mark.processes


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(
        scale_name="toy",
        processor=str(BUILTIN_FOLDER),
        dataset_name="charts?num_rows=16",
        scratch=str(tmp_path),
    )


@pytest.mark.timeout(1200)
def test_every_step_works_at_toy_scale(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--scale", "toy", "--output_dir", str(tmp_path)]
    command += ["--time_limit", "1150"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    output, errors = process.communicate(timeout=1190)
    report = json.loads(output.splitlines()[-1])
    print((tmp_path / "gpu.txt").read_text())
    assert process.returncode == 0, errors
    assert report["steps"].keys() == {step.name for step in STEPS}
    assert report == json.loads((tmp_path / "gpu.json").read_text())
    for name, result in report["steps"].items():
        if name in LEFT_OUT_ON_CPUS and result["status"] == "left out":
            assert result["reason"] == LEFT_OUT_ON_CPUS[name]
        else:
            assert result["status"] == "ok", (name, result["reason"])
            assert result["figures"]
    figures = {name: result["figures"] for name, result in report["steps"].items()}
    assert figures["exact"]["contract_tests_passed"] > 0
    assert figures["exact"]["float32_equal_texts"] == 1
    assert figures["memory"]["num_out_of_memory"] > 0
    assert figures["memory"]["equal_texts_after"] == 1
    assert figures["train-lora"]["largest_loss_difference"] < 1e-3
    assert figures["infer-shared"]["num_failed"] == 0
    assert {(step, figure) for step, figure in AIMS if figure not in figures[step]} == set()
    for parent in ("/dev/shm", tempfile.gettempdir()):
        assert not list(Path(parent).glob(f"vlmray-gpu-{process.pid}-*"))


def test_what_a_killed_check_left_in_memory_is_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = [f"vlmray-gpu-{ended.pid}-a", f"vlmray-gpu-{os.getpid()}-a", "vlmray-gpu-kept-a", "other"]
    for name in names:
        (tmp_path / name / "models").mkdir(parents=True)
    remove_left_behind(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


def test_a_step_that_takes_too_long_is_ended_with_all_it_started(setting: Setting, tmp_path: Path) -> None:
    turn = Turn(next(step for step in STEPS if step.name == "finetune"), setting, tmp_path)
    process = psutil.Process(turn._process.pid)
    started: list[psutil.Process] = []

    def ray_has_started() -> bool:
        started[:] = process.children(recursive=True)
        return any(each.name() == "raylet" for each in started)

    assert turn._process.stdin is not None
    turn._process.stdin.write("go\n")
    turn._process.stdin.flush()
    wait_until(ray_has_started)
    assert turn.take(limit_s=0.1) == ("out of time", "not done after 0.1 s")
    turn.end()
    wait_until(lambda: not any(each.is_running() for each in [process, *started]))


def test_a_step_that_fails_stops_nothing(setting: Setting, tmp_path: Path) -> None:
    bad = dataclasses.replace(setting, processor=str(tmp_path / "gone"))
    steps = [step for step in STEPS if step.name in ("engine-3b", "device")]
    results: dict[str, dict[str, object]] = {}
    take_steps(steps[::-1], bad, tmp_path, time.monotonic() + 100, results)
    assert [result["status"] for result in results.values()] == ["failed", "ok"]
    assert "gone" in str(results["engine-3b"]["reason"])


def test_a_step_without_its_packages_says_so() -> None:
    step = Step(
        name="x", function="engine:measure", limit_s=1, needs=("torch", "no_such_package", "nor_this")
    )
    assert step.missing("cpu") == "no no_such_package and no nor_this here"
    assert Step(name="x", function="y:z", limit_s=1, gpu_only=True).missing("cpu") == "needs a GPU"
    assert Step(name="x", function="y:z", limit_s=1, gpu_only=True).missing("cuda") is None


def test_aims_are_judged_at_full_scale_alone() -> None:
    report = {
        "device": "a card", "scale": "full", "commit": "c", "date": "d", "python": "3", "versions": {},
        "steps": {
            "engine-7b": {
                "status": "ok", "reason": "", "elapsed_s": 1.0,
                "figures": {"share_of_limit": 0.5, "times_generate_padded": 4.0},
            }
        },
    }  # fmt: skip
    table = format_table(report)
    assert "aim 0.45: met" in table
    assert "aim 5: MISSED" in table
    assert "aim" not in format_table({**report, "scale": "toy"})


def test_an_unknown_step_is_a_mistake_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--only", "exact,speed"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        f"unknown step 'speed'; known: {', '.join(s.name for s in STEPS)}"
    )
    assert set(SCALES) == {"full", "toy"}
