"""Training samples on Ray: for each worker, tasks that read and decode ahead of it, in order.

    plan -> read (where the rows are) -> decode (on any CPU) -> the worker's batches

Plain tasks, a few in flight for each worker. Ray Data would run its scheduler inside every training worker,
a busy thread that holds the interpreter lock when the model wants it; and its split deals blocks to whichever
worker asks first, so that no two runs would train the same batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import ray
import ray.train

from vlmray import cluster
from vlmray.training.batch_plan import BatchPlan
from vlmray.training.run import TrainingRun
from vlmray.training.samples import (
    SAMPLE_SCHEMA,
    Conversations,
    Features,
    SampleRow,
    open_images,
    to_feature,
)
from vlmray.training.trainer import DivergedError, NothingLearnedError
from vlmray.training.worker import TrainingMistake, train_loop_per_worker

_SAMPLES_PER_TASK = 16
_TASKS_AHEAD = 3
_PATIENCE_S = 5.0

Slots = Sequence[int | None]
"""Samples of one or several batches; None for an empty slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Samples that every worker reads its own part of."""

    samples: ray.ObjectRef
    """`Conversations`; unpacked only where their source can be read."""

    on_driver: bool
    """The source lies on the driver's machine."""

    driver: dict[str, str]
    """Label selector of that machine."""

    cpus_per_task: float
    """What the workers leave on each node."""

    @classmethod
    def of(cls, samples: Conversations, cpus_per_task: float) -> Shard:
        """Describe samples that this process, the driver, has opened."""
        return cls(
            samples=ray.put(samples),
            on_driver=samples.source.on_driver,
            driver=cluster.driver_node(),
            cpus_per_task=cpus_per_task,
        )

    def read(self, plan: BatchPlan, rank: int, start: int, stop: int) -> Iterator[Features]:
        """Yield the samples of a worker's batches `start` to `stop`, an item each."""
        per_task = -(-_SAMPLES_PER_TASK // plan.batch_size)
        pending: deque[_Opened] = deque()
        for first in range(start, stop, per_task):
            batches = plan.batches(rank, first, min(first + per_task, stop))
            pending.append(self._open([slot for batch in batches for slot in batch]))
            if len(pending) > _TASKS_AHEAD:
                yield from _batches_of(pending.popleft(), plan.batch_size)
        while pending:
            yield from _batches_of(pending.popleft(), plan.batch_size)

    def _open(self, slots: Slots) -> _Opened:
        """Start reading and decoding samples."""
        anywhere = {"num_cpus": self.cpus_per_task}
        if not self.on_driver:
            table = _read_and_decode.options(**anywhere).remote(self.samples, slots)
            return _Opened(table, lambda: ray.get(self.samples).read(slots))
        # Tasks tied to one machine ask for no CPU: the head of a cluster may offer none.
        rows = _read.options(num_cpus=0, label_selector=self.driver).remote(self.samples, slots)
        return _Opened(_decode.options(**anywhere).remote(rows), lambda: ray.get(rows).to_pylist())


class _Opened(NamedTuple):
    """Samples that a task reads and decodes."""

    table: ray.ObjectRef
    read: Callable[[], list[SampleRow]]
    """Gives them undecoded, without a CPU of the cluster."""

    def get(self) -> list[SampleRow]:
        """Return them; where the task finds no CPU, the worker does its work.

        A node that is about to be taken starts no task any more, and its worker has a checkpoint to come to.
        """
        ready, _ = ray.wait([self.table], timeout=_PATIENCE_S)
        if ready:
            return ray.get(self.table).to_pylist()
        ray.cancel(self.table)
        return open_images(self.read())


@ray.remote
def _read(samples: Conversations, slots: Slots) -> pa.Table:
    return pa.Table.from_pylist(samples.read(slots), SAMPLE_SCHEMA)


@ray.remote
def _decode(table: pa.Table) -> pa.Table:
    return pa.Table.from_pylist(open_images(table.to_pylist()), SAMPLE_SCHEMA)


@ray.remote
def _read_and_decode(samples: Conversations, slots: Slots) -> pa.Table:
    return pa.Table.from_pylist(open_images(samples.read(slots)), SAMPLE_SCHEMA)


def _batches_of(opened: _Opened, batch_size: int) -> Iterator[Features]:
    features = [to_feature(row) for row in opened.get()]
    for start in range(0, len(features), batch_size):
        yield features[start : start + batch_size]


def train_on_ray(config: dict[Any, Any]) -> dict[str, Any]:
    """Train as a worker of Ray Train; return the outcome as plain values.

    They pass through Ray's controller, which for anything else would import all of torch.
    """
    try:
        outcome = train_loop_per_worker(config, RayWorker(config["run"], config["shards"], config["board"]))
    except (TrainingMistake, DivergedError, NothingLearnedError) as mistake:
        return {"mistake": str(mistake)}  # raised, it would be tried again and again
    return dataclasses.asdict(outcome)


class RayWorker:
    """A worker of Ray Train: samples come from shards, checkpoints go to the run's storage."""

    def __init__(self, run: TrainingRun, shards: Mapping[str, Shard], board: Any) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self._run = run
        self._shards = shards
        self._board = board
        self._told_of: set[str] = set()
        node = ray.get_runtime_context().get_node_id()
        board.join.remote(self.rank, self.world_size, node)

    def read(self, name: str, start: int, stop: int) -> Iterator[Features]:
        """Yield the samples of this worker's batches, read and decoded by tasks."""
        return self._shards[name].read(self._run.plan(name, self.world_size), self.rank, start, stop)

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        """Give the last checkpoint of the run's storage, as a local folder."""
        last = ray.train.get_checkpoint()
        if last is None:
            yield None
        else:
            with last.as_directory() as folder:
                yield Path(folder)

    def save(self, metrics: Mapping[str, float], folder: Path) -> None:
        """Copy a checkpoint to the run's storage, and delete it here."""
        ray.train.report(dict(metrics), checkpoint=ray.train.Checkpoint.from_directory(folder))
        shutil.rmtree(folder)

    def tell(self, **progress: Any) -> None:
        """Tell the board how far training is; one worker does for all."""
        if self.rank == 0:
            self._board.tell.remote(progress)

    def must_save(self) -> bool:
        """Tell whether a machine of the run got notice; what rank 0 knows counts for all."""
        info = ray.train.get_preemption_info()
        leaving = set(info.preempted_node_ids) if info else set()
        if leaving <= self._told_of:
            return False
        self._told_of |= leaving
        if self.rank == 0:
            self._board.note.remote("a machine is about to be taken away: saving a checkpoint")
        return True
