"""How far training is: workers tell an actor, the driver reads it and shows one bar for the whole run."""

from __future__ import annotations

from typing import Any

import ray
from ray.train import UserCallback
from tqdm import tqdm

from vlmray import cluster
from vlmray.errors import RunError
from vlmray.reports.bar import open_bar, write_above_bar
from vlmray.reports.text import shorten


class Board:
    """The latest word of the workers; an actor beside the driver."""

    def __init__(self) -> None:
        self._progress: dict[str, Any] = {}
        self._notes: list[str] = []
        self._last_note = ""
        self._nodes: dict[int, str] = {}
        self._world_size = 0

    @classmethod
    def start(cls) -> Any:
        """Start the actor and return its handle."""
        options = {"num_cpus": 0, "label_selector": cluster.driver_node(), "max_concurrency": 4}
        return ray.remote(cls).options(**options).remote()

    def join(self, rank: int, world_size: int, node: str) -> None:
        """Take note of a worker that has begun, and on which node it is."""
        if rank in self._nodes or world_size != self._world_size:  # the first of another start
            self._nodes = {}
        self._world_size = world_size
        self._last_note = ""
        self._nodes[rank] = node

    def leave(self) -> set[str]:
        """Take note that the workers are no more; return the nodes they were on."""
        nodes, self._nodes = set(self._nodes.values()), {}
        return nodes

    def tell(self, progress: dict[str, Any]) -> None:
        """Take what changed: `step`, `num_steps`, losses; `started` says that a worker just began."""
        if progress.pop("started", False) and progress["step"]:
            workers = f"{self._world_size} worker{'' if self._world_size == 1 else 's'}"
            self.note(f"going on from the checkpoint of step {progress['step']} with {workers}")
        self._progress.update(progress)

    def note(self, text: str) -> None:
        """Take a line to show, once in each start: a loss is told as often as the controller looks."""
        if text != self._last_note:
            self._notes.append(text)
        self._last_note = text

    def read(self) -> tuple[dict[str, Any], list[str]]:
        """Return the latest of everything, and the notes that were not read before.

        `running` says whether all workers of the last start are at work.
        """
        notes, self._notes = self._notes, []
        running = 0 < len(self._nodes) == self._world_size and not cluster.dead(self._nodes.values())
        return {**self._progress, "running": running}, notes


class Restarts(UserCallback):
    """Has Ray Train's controller say on the board why workers start again, and end what fails all the time.

    A program that fails where it is started again is at fault, machines that leave are not: these may be
    any number.

    Args:
        board: Where to say it.
        max_failures: Times to start again without a new checkpoint.
    """

    def __init__(self, board: Any, max_failures: int) -> None:
        self._board = board
        self._max_failures = max_failures
        self._num_failures = 0

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Begin to count anew: there is a new checkpoint."""
        self._num_failures = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Note which worker was lost and why.

        Raises:
            RunError: the same steps have failed too often, which ends the run.
        """
        # A worker that died takes the others' connections with it; theirs is not the cause.
        dead = {rank: died for rank, error in worker_exceptions.items()
                if (died := getattr(error, "health_check_failure", None)) is not None}  # fmt: skip
        announced = any(getattr(died, "preempted", False) for died in dead.values())
        if cluster.gone(ray.get(self._board.leave.remote())) or announced:
            self._board.note.remote("a machine was lost; starting again from the last checkpoint")
            return
        rank = min(dead or worker_exceptions)
        self._num_failures += 1
        if self._num_failures > self._max_failures:
            raise RunError(cluster.root_cause(worker_exceptions[rank]))
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
            write_above_bar(note)
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
