r"""Everything that only a GPU can tell, by one command: is it right there, does it fit, how fast is it?

    make gpu                      # on a machine with a GPU: a list of steps, in about eight minutes
    make gpu SCALE=toy            # the same steps on CPUs, with tiny models
    python -m benchmarks.gpu --only exact,engine-7b --output_dir outputs/gpu

Each step is a process of its own with a time limit; one that fails or hangs stops nothing, and figures are
printed as soon as they are known. Steps whose packages are not installed are left out and say so. The next
step loads its libraries while one works, and then waits for its turn. `gpu.json` and `gpu.txt` in
`--output_dir` hold everything, and the logs of the steps lie beside them.

Models have random weights in the shapes of Qwen2.5-VL. Tokenizer and rows are those of the folder that
`python -m benchmarks.gpu.pack` makes, where it is there; otherwise the built-in ones, which are far smaller:
then rates say little.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from benchmarks.gpu.setting import SCALES, Setting
from benchmarks.gpu.steps import AIMS, STEPS, Step
from vlmray.builtin.models import BUILTIN_FOLDER

ROOT = Path(__file__).parents[2]
PACK = ROOT / ".gpu"
_PACKAGES = (
    "torch", "transformers", "accelerate", "peft", "trl", "datasets", "ray", "bitsandbytes", "vllm",
    "flash_attn",
)  # fmt: skip
_MEMORY = Path("/dev/shm")
_SCRATCH = "vlmray-gpu-"
_LEAST_MEMORY = 40 * 2**30  # bytes; two models of 7 billion parameters and what else is written


class Turn:
    """A step and its process, from loading to its end."""

    def __init__(self, step: Step, setting: Setting, folder: Path) -> None:
        self.step = step
        self.figures: dict[str, Any] = {}
        self.log = folder / f"{step.name}.log"
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        if setting.scale_name == "toy":  # tiny models gain nothing from threads, and lose much on busy cores
            environment["OMP_NUM_THREADS"] = "1"
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu.child",
            step.name,
            json.dumps(dataclasses.asdict(setting)),
        ]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, start_new_session=True,
            )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def take(self, limit_s: float) -> tuple[str, str]:
        """Let the step work; return `ok`, `failed` or `out of time`, and the reason."""
        assert self._process.stdin is not None
        deadline = time.monotonic() + limit_s
        with contextlib.suppress(BrokenPipeError):  # it could not even load; its exit tells
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return "out of time", f"not done after {limit_s:.3g} s"
            if line is None:
                break
            name, value = json.loads(line)
            self.figures[name] = value
            print(f"  {self.step.name:14} {name:38} {_show(value)}", flush=True)
        if self._process.wait() == 0:
            return "ok", ""
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["no word"]
        return "failed", lines[-1][:300]

    def end(self) -> None:
        """Leave none of its processes behind."""
        if self._process.poll() is None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=10)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)


def main() -> None:
    """Take the steps, and print a table and one JSON line."""
    options = parse_options()
    started = time.monotonic()
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for parent in (_MEMORY, Path(tempfile.gettempdir())):
        remove_left_behind(parent)
    parent = _scratch_parent(options.scale)
    scratch = Path(tempfile.mkdtemp(prefix=f"{_SCRATCH}{os.getpid()}-", dir=parent))
    setting = Setting(
        scale_name=options.scale, processor=options.processor, dataset_name=options.dataset_name,
        scratch=str(scratch),
    )  # fmt: skip
    print(
        f"{options.scale} scale on {setting.device}; {setting.processor}, {setting.dataset_name}\n",
        flush=True,
    )
    results: dict[str, dict[str, Any]] = {}
    try:
        take_steps(options.steps, setting, folder, started + options.time_limit, results)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        report = {**describe(setting), "elapsed_s": round(time.monotonic() - started, 1), "steps": results}
        table = format_table(report)
        (folder / "gpu.txt").write_text(table + "\n")
        (folder / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        print(f"\n{table}\n{json.dumps(report)}")
    sys.exit(any(result["status"] in ("failed", "out of time") for result in results.values()))


def parse_options() -> argparse.Namespace:
    """Read the command line, and fill in what the pack has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = ", ".join(step.name for step in STEPS)
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--only", help=f"steps to take, with commas: {names}")
    parser.add_argument("--skip", help="steps to leave out")
    parser.add_argument("--processor", help="folder of a Qwen2.5-VL, weights apart; default: the pack's")
    parser.add_argument("--dataset_name", help="ChartQA or its like; default: the pack's")
    parser.add_argument("--output_dir", default="outputs/gpu")
    parser.add_argument("--time_limit", type=float, default=480, help="seconds for all steps together")
    options = parser.parse_args()
    known = {step.name: step for step in STEPS}
    only, skip = ((given or "").replace(" ", "").split(",") for given in (options.only, options.skip))
    unknown = [name for name in [*only, *skip] if name and name not in known]
    if unknown:
        parser.error(f"unknown step {unknown[0]!r}; known: {names}")
    options.steps = [
        step for step in STEPS if (not options.only or step.name in only) and step.name not in skip
    ]
    has_pack = (PACK / "processor").is_dir()
    options.processor = options.processor or str(PACK / "processor" if has_pack else BUILTIN_FOLDER)
    packed = next((PACK / "chartqa").rglob("*.parquet"), None)
    options.dataset_name = options.dataset_name or (
        packed.resolve().as_uri() if packed else "charts?num_rows=512"
    )
    return options


def take_steps(
    steps: Sequence[Step], setting: Setting, folder: Path, deadline: float, results: dict[str, dict[str, Any]]
) -> None:
    """Take steps one after the other, the next one loading meanwhile.

    Args:
        steps: To take.
        setting: What they work on.
        folder: For their logs.
        deadline: No step goes on after that, by the monotonic clock.
        results: What each found is put here, as soon as it has ended.
    """
    left_out = {step.name: why for step in steps if (why := step.missing(setting.device))}
    ready = [step for step in steps if step.name not in left_out]
    for name, why in left_out.items():
        results[name] = {"status": "left out", "reason": why, "elapsed_s": 0.0, "figures": {}}
        print(f"{name}: left out, {why}", flush=True)
    turns: list[Turn] = []
    try:
        for place, step in enumerate(ready):
            turns += [Turn(each, setting, folder) for each in ready[len(turns) : place + 2]]
            turn, began = turns[place], time.monotonic()
            limit_s = min(step.limit_s * setting.scale.patience, deadline - began)
            if limit_s <= 0:
                status, reason = "left out", "no time was left"
            else:
                print(f"{step.name}:", flush=True)
                status, reason = turn.take(limit_s)
            turn.end()
            elapsed_s = round(time.monotonic() - began, 1)
            print(f"  {step.name:14} {status} after {elapsed_s} s{reason and ': ' + reason}", flush=True)
            results[step.name] = {
                "status": status, "reason": reason, "elapsed_s": elapsed_s, "figures": turn.figures
            }  # fmt: skip
    finally:
        for turn in turns:
            turn.end()


def describe(setting: Setting) -> dict[str, Any]:
    """Say on what the figures were found."""
    import torch

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "device": torch.cuda.get_device_name() if setting.device == "cuda" else platform.machine(),
        "num_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "scale": setting.scale_name,
        "processor": Path(setting.processor).name,
        "dataset_name": setting.dataset_name.rpartition("/")[2],
    }


def format_table(report: dict[str, Any]) -> str:
    """Write what was found for people."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    lines = [
        f"{report['device']}, {report['scale']} scale, commit {report['commit']}, {report['date']}",
        f"Python {report['python']}, {versions}",
        "",
        f"{'step':14} {'figure':38} value",
    ]
    for name, result in report["steps"].items():
        note = f": {result['reason']}" if result["reason"] else ""
        lines.append(f"{name:14} {result['status']}, {result['elapsed_s']} s{note}")
        for figure, value in result["figures"].items():
            aim = AIMS.get((name, figure)) if report["scale"] == "full" else None
            verdict = "" if aim is None else f"  aim {aim:g}: {'met' if value >= aim else 'MISSED'}"
            lines.append(f"{'':14} {figure:38} {_show(value)}{verdict}")
    return "\n".join(lines)


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "".join(f"\n{'':17}{row[1]:>10}  {row[0]}" for row in value)
    return ", ".join(map(_show, value)) if isinstance(value, list) else str(value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _scratch_parent(scale: str) -> Path:
    """Return where models are written: into memory, if that is large enough for those of full scale."""
    needed = _LEAST_MEMORY if scale == "full" else 2**30
    if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free >= needed:
        return _MEMORY
    return Path(tempfile.gettempdir())


def remove_left_behind(parent: Path) -> None:
    """Remove what checks that were killed left in `parent`; `/dev/shm` is memory."""
    for folder in parent.glob(f"{_SCRATCH}*-*"):
        pid = folder.name.removeprefix(_SCRATCH).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
