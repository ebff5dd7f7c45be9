"""How far training is: workers tell an actor, the driver reads it and shows one bar for the whole run."""

from __future__ import annotations

import sys
from typing import Any

import ray
from ray.train import UserCallback
from tqdm import tqdm

from vlmray import cluster
from vlmray.reports.bar import open_bar
from vlmray.reports.text import shorten


class Board:
    """The latest word of the workers; an actor beside the driver."""

    def __init__(self) -> None:
        self._progress: dict[str, Any] = {}
        self._notes: list[str] = []

    @classmethod
    def start(cls) -> Any:
        """Start the actor and return its handle."""
        options = {"num_cpus": 0, "label_selector": cluster.driver_node(), "max_concurrency": 4}
        return ray.remote(cls).options(**options).remote()

    def tell(self, progress: dict[str, Any]) -> None:
        """Take what changed: `step`, `num_steps`, losses; `started` says that a worker just began."""
        if progress.pop("started", False) and progress["step"]:
            self._notes.append(f"going on from the checkpoint of step {progress['step']}")
        self._progress.update(progress)

    def note(self, text: str) -> None:
        """Take a line to show."""
        self._notes.append(text)

    def read(self) -> tuple[dict[str, Any], list[str]]:
        """Return the latest of everything, and the notes that were not read before."""
        notes, self._notes = self._notes, []
        return self._progress, notes


class TellFailures(UserCallback):
    """Has Ray Train's controller say on the board why workers are started again."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Note which worker was lost and why."""
        # A worker that died takes the others' connections with it; theirs is not the cause.
        dead = [rank for rank, error in worker_exceptions.items() if hasattr(error, "health_check_failure")]
        rank = min(dead or worker_exceptions)
        cause = "its process died" if dead else shorten(cluster.root_cause(worker_exceptions[rank]), 160)
        self._board.note.remote(f"worker {rank} was lost ({cause}); starting again from the last checkpoint")


class ProgressBar:
    """One bar: steps, loss, samples per second, time left.

    Args:
        num_steps: Optimizer steps of the run.
        samples_per_step: Samples of all workers in a step.
    """

    def __init__(self, num_steps: int, samples_per_step: int) -> None:
        self._num_steps = num_steps
        self._samples_per_step = samples_per_step
        self._bar = self._open(0)
        self._bar.set_postfix_str("starting workers")

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def show(self, told: tuple[dict[str, Any], list[str]]) -> None:
        """Show what a board said."""
        progress, notes = told
        for note in notes:
            tqdm.write(note, file=sys.stderr)
        step = progress.get("step")
        if step is None:
            return
        if notes or step < self._bar.n:  # steps of an earlier start are no measure of this one's speed
            self._bar.leave = False
            self._bar.close()
            self._bar = self._open(step)
        losses = [name for name in ("loss", "eval_loss") if name in progress]
        shown: dict[str, str] = {name: f"{progress[name]:.4g}" for name in losses}
        rate = self._bar.format_dict["rate"]
        if rate:
            shown["samples/s"] = f"{rate * self._samples_per_step:.3g}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def _open(self, step: int) -> tqdm[Any]:
        return open_bar(self._num_steps, step, "steps", smoothing=0.05)
