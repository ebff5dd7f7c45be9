"""Training samples on Ray Data: for each worker a pipeline that reads and decodes ahead of it, in order.

plan -> read (where the rows are) -> decode (CPU tasks anywhere) -> the worker's batches
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, TaskPoolStrategy
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.train import DataConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vlmray import cluster
from vlmray.batches import BatchPlan
from vlmray.conversations import SAMPLE_SCHEMA, Conversations, Features, open_images, to_feature

_SAMPLES_PER_TASK = 16
_MAX_TASKS = 10_000

Batch = tuple[int, Sequence[int | None]]
"""Number of a batch and its samples."""


class PlannedShards(DataConfig):
    """Gives every worker of Ray Train the whole shard: which samples are whose is planned, not drawn.

    Ray's own split deals blocks to whichever worker asks first, so no two runs would train the same
    batches, and none could go on where another ended.
    """

    def __init__(self) -> None:
        super().__init__(datasets_to_split=[])

    def configure(self, datasets: Any, world_size: int, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        return [dict(datasets) for _ in range(world_size)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Samples as workers get them from `ray.train.get_dataset_shard`."""

    samples: ray.ObjectRef
    """`Conversations`; unpacked only where their source can be read."""

    on_driver: bool
    """The source lies on the driver's machine."""

    driver: dict[str, str]
    """Label selector of that machine."""

    @classmethod
    def of(cls, samples: Conversations) -> Shard:
        """Describe samples that this process, the driver, has opened."""
        return cls(samples=ray.put(samples), on_driver=samples.source.on_driver, driver=cluster.driver_node())

    def read(self, plan: BatchPlan, rank: int, start: int, stop: int) -> Iterator[Features]:
        """Yield the samples of a worker's batches `start` to `stop`, an item each."""
        if start >= stop:
            return
        per_task = max(-(-_SAMPLES_PER_TASK // plan.batch_size), -(-(stop - start) // _MAX_TASKS))
        firsts = range(start, stop, per_task)
        tasks = [
            [(number, plan.batch(rank, number)) for number in range(first, min(first + per_task, stop))]
            for first in firsts
        ]
        # Not in the worker's own process: Ray Data's scheduler is a busy thread, and a model of many small
        # operations would wait for the interpreter lock before each of them.
        tables = _feed.options(scheduling_strategy=_this_node()).remote(self, tasks, plan.world_size)
        expected = iter(range(start, stop))
        try:
            for number, rows in _group(map(ray.get, tables)):
                assert number == next(expected), f"batch {number} came out of order"
                yield [to_feature(row) for row in rows]
        finally:
            ray.cancel(tables, force=True)  # a run that stops early leaves batches behind

    def run(self, tasks: Sequence[Sequence[Batch]], world_size: int) -> Iterator[pa.Table]:
        """Run the pipeline of a worker in this process, and yield its tables in order."""
        num_tasks = len(tasks)
        DataContext.get_current().execution_options.preserve_order = True
        num_cpus = cluster.cpus_per_task()
        share = int(ray.cluster_resources().get("CPU", 1) / num_cpus / world_size)
        few = TaskPoolStrategy(max(1, min(share, num_tasks)))
        anywhere: dict[str, Any] = {"num_cpus": num_cpus, "compute": few}
        # Tasks tied to one machine ask for no CPU: the head of a cluster may offer none.
        here: dict[str, Any] = {"num_cpus": 0, "compute": few, "label_selector": self.driver}
        tables = ray.data.read_datasource(
            _BatchSource(self.samples, tasks),
            override_num_blocks=num_tasks,
            **(here if self.on_driver else anywhere),
        ).map_batches(_decode, batch_size=None, batch_format="pyarrow", **anywhere)
        return iter(tables.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))


@ray.remote(num_cpus=0, max_retries=0, num_returns="streaming", _generator_backpressure_num_objects=4)
def _feed(shard: Shard, tasks: Sequence[Sequence[Batch]], world_size: int) -> Iterator[pa.Table]:
    """Run a worker's pipeline beside it, a few tables ahead."""
    DataContext.get_current().enable_progress_bars = False
    DataContext.get_current().print_on_execution_start = False
    yield from shard.run(tasks, world_size)


def _this_node() -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


class _BatchSource(Datasource):
    """Batches as Ray Data reads them, a few to a task."""

    def __init__(self, samples: ray.ObjectRef, tasks: Sequence[Sequence[Batch]]) -> None:
        super().__init__()
        self._samples = samples
        self._tasks = tasks

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        return [
            ReadTask(
                functools.partial(_read, self._samples, batches),
                BlockMetadata(
                    num_rows=sum(len(slots) for _, slots in batches),
                    size_bytes=None,
                    input_files=None,
                    exec_stats=None,
                ),
            )
            for batches in self._tasks
        ]


def _read(samples: ray.ObjectRef, batches: Sequence[Batch]) -> Iterator[pa.Table]:
    conversations = ray.get(samples)
    slots = [slot for _, slots in batches for slot in slots]
    numbers = [number for number, slots in batches for _ in slots]
    rows = conversations.read(slots)
    yield pa.Table.from_pylist(
        [{**row, "batch": number} for row, number in zip(rows, numbers, strict=True)], SAMPLE_SCHEMA
    )


def _decode(table: pa.Table) -> pa.Table:
    return pa.Table.from_pylist(open_images(table.to_pylist()), SAMPLE_SCHEMA)


def _group(tables: Iterator[pa.Table]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield (number, rows) of each batch from tables whose rows come batch by batch."""
    number = -1
    rows: list[dict[str, Any]] = []
    for table in tables:
        for row in table.to_pylist():
            if row["batch"] != number and rows:
                yield number, rows
                rows = []
            number = row["batch"]
            rows.append(row)
    if rows:
        yield number, rows
