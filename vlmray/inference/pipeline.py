"""The pipeline on Ray Data: read, prepare, generate on a pool of model replicas, score, write.

    read + prepare (CPU tasks) -> generate (actors that hold the model) -> score + write (CPU tasks)
                                                                              |
                      iter_finished  <- a few numbers per chunk -- the driver

It streams: what is in flight is bounded, whatever the size of the dataset, and neither images nor texts
pass through the driver. A chunk of rows is the unit of work and of loss: a replica that dies has its
chunk generated again elsewhere, a run that dies loses the chunks in flight. What the driver does is once
for each chunk, so a chunk is larger where there are many rows.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from vlmray import cluster
from vlmray.dataset.registry import DatasetSpec
from vlmray.dataset.rows import read_chunk
from vlmray.inference import stages
from vlmray.inference.chunks import CacheUse, Chunk, Finished, Reuse, pack, unpack
from vlmray.inference.endpoint.keeping import api_key
from vlmray.inference.plan import InferenceRun
from vlmray.inference.replica import Replica, chunks_at_once, start_claims
from vlmray.inference.result_folder import ResultFolder
from vlmray.inference.reuse.keeping import SharedAnswers, start_answers
from vlmray.inference.stages import Task
from vlmray.inference.timeline import Watch

logger = logging.getLogger(__name__)

_BATCHES_PER_CHUNK = 4
"""Rows of like length are batched together within a chunk, so it holds several batches."""

_ROWS_PER_CHUNK = 64
"""More where a batch has more, and where there are many rows."""

_MOST_ROWS_PER_CHUNK = 512
"""What is in flight has to fit into memory, with its images."""

_CHUNKS_PER_REPLICA = 64
"""Where there are many rows, a chunk is this share of what a replica will answer: what is lost with one that
dies, what others wait for at the end, and how far the bar moves at a time."""

_NUM_LOCAL_TASKS = 4
"""Reading or writing tasks at a time on the driver's machine."""


def iter_finished(run: InferenceRun, replicas: cluster.ReplicaPlan) -> Generator[Finished]:
    """Answer the pending rows; tell of each chunk once it is written. To close it stops the stages."""
    known = start_answers(run, replicas, count_chunks(run, replicas))
    wired = _wire(run, replicas, known)
    for block in wired.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
        yield unpack(block)
    if known is not None and (problems := known.problems()):
        logger.warning("%s", problems)


def _wire(run: InferenceRun, replicas: cluster.ReplicaPlan, known: SharedAnswers | None) -> Dataset:
    """Connect the stages; nothing runs until the result is consumed."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    chunk_size = _rows_of_chunk(run, replicas)
    num_chunks = count_chunks(run, replicas)
    num_calls = chunks_at_once(run.config.engine)
    # Tasks tied to this machine ask for no CPU: the head of a cluster may offer none.
    few = TaskPoolStrategy(min(_NUM_LOCAL_TASKS, num_chunks))
    here: dict[str, Any] = {"label_selector": cluster.driver_node(), "num_cpus": 0, "compute": few}
    anywhere = {"num_cpus": cluster.cpus_per_task()}
    prepare = functools.partial(
        _prepare, task=run.task, keep_images=run.folder.output_format != "parquet",
        fetches_images=run.fetches_images,
    )  # fmt: skip
    if run.source.on_driver:
        read = ray.data.read_datasource(_RowSource(run, chunk_size), override_num_blocks=num_chunks, **here)
        rows = _map(read, prepare, **anywhere)
    else:  # where rows are read they are prepared: a task less for each chunk
        source = _RowSource(run, chunk_size, prepare)
        rows = ray.data.read_datasource(source, override_num_blocks=num_chunks, **anywhere)
    rows = _map(
        rows,
        _Replica,
        fn_constructor_args=(
            run.worker_config,
            replicas,
            run.task,
            start_claims(),
            run.folder,
            api_key(run.config),
            known,
        ),
        compute=ActorPoolStrategy(
            min_size=min(replicas.min_replicas, num_chunks),
            max_size=min(replicas.max_replicas, num_chunks),
            # What the engine takes is answered, the next chunk is made ready, and one more is at hand.
            enable_true_multi_threading=True,
            max_concurrent_calls_per_actor=num_calls + 1,
            max_tasks_in_flight_per_actor=num_calls + 2,
        ),
        num_cpus=replicas.num_cpus,
        num_gpus=replicas.num_gpus,
        runtime_env=replicas.runtime_env,
    )
    finish = functools.partial(_score_and_save, task=run.task, folder=run.folder)
    return _map(rows, finish, **(here if run.folder.is_local else anywhere))


def _map(rows: Dataset, fn: Any, **options: Any) -> Dataset:
    return rows.map_batches(fn, batch_size=1, batch_format="pyarrow", **options)


def count_chunks(run: InferenceRun, replicas: cluster.ReplicaPlan) -> int:
    """Return the units of work of a run; no more replicas than that are started."""
    return -(-len(run.pending) // _rows_of_chunk(run, replicas))


def _rows_of_chunk(run: InferenceRun, replicas: cluster.ReplicaPlan) -> int:
    batch_size = -(-run.config.batch_size // run.task.num_samples)  # of rows, each with its draws
    return _chunk_size(len(run.pending), batch_size, replicas.max_replicas)


def _chunk_size(num_rows: int, batch_size: int, num_replicas: int) -> int:
    """Rows of one unit of work: several batches, but enough units to keep all replicas busy to the end."""
    many = min(_MOST_ROWS_PER_CHUNK, num_rows // (_CHUNKS_PER_REPLICA * num_replicas))
    most = max(many, min(_BATCHES_PER_CHUNK * batch_size, max(_ROWS_PER_CHUNK, batch_size)))
    least = min(batch_size, _ROWS_PER_CHUNK // _BATCHES_PER_CHUNK)
    return min(most, max(least, -(-num_rows // (4 * num_replicas))))


class _RowSource(Datasource):
    """A source as Ray Data reads it: one task for each chunk of the pending rows."""

    def __init__(
        self, run: InferenceRun, chunk_size: int, then: Callable[[pa.Table], pa.Table] | None = None
    ) -> None:
        super().__init__()
        self._run = run
        self._chunk_size = chunk_size
        self._then = then

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        source = ray.put(self._run.source)
        pending, size = self._run.pending, self._chunk_size
        tasks = []
        for start in range(0, len(pending), size):
            # A task gets the row before its chunk and a chunk more, to move its borders (see read_chunk).
            first = max(0, start - 1)
            read = functools.partial(
                _read, source, self._run.spec, self._run.config.dataset_split,
                selected=pending[first : start + 2 * size + 1], start=start - first, size=size,
                then=self._then,
            )  # fmt: skip
            metadata = BlockMetadata(
                num_rows=min(size, len(pending) - start), size_bytes=None, input_files=None, exec_stats=None
            )
            tasks.append(ReadTask(read, metadata))
        return tasks


def _read(
    source: ray.ObjectRef, spec: DatasetSpec, split: str, *, selected: Sequence[int], start: int, size: int,
    then: Callable[[pa.Table], pa.Table] | None,
) -> Iterator[pa.Table]:  # fmt: skip
    found = ray.get(source)
    watch = Watch()
    rows = read_chunk(found, spec, split, selected, start, start + size)
    if rows:
        block = pack(Chunk(rows, [watch.span("read")]))
        yield then(block) if then else block


def _prepare(chunk: pa.Table, *, task: Task, keep_images: bool, fetches_images: bool) -> pa.Table:
    rows, spans = unpack(chunk)
    watch = Watch()
    rows = stages.prepare_rows(rows, task, keep_images=keep_images, fetches_images=fetches_images)
    return pack(Chunk(rows, [*spans, watch.span("prepare")]))


class _Replica(Replica):
    """An actor that holds the model.

    Ray calls it with the next chunk while it works on one, in another thread.
    """

    def __call__(self, chunk: pa.Table) -> pa.Table:
        rows, spans = unpack(chunk)
        rows = self.answer(rows, spans)
        return pack(Chunk(rows, spans))


def _score_and_save(chunk: pa.Table, *, task: Task, folder: ResultFolder) -> pa.Table:
    """Score and write rows, and leave of them what the driver counts."""
    rows, spans = unpack(chunk)
    watch = Watch()
    rows = [stages.score_row(row, task) for row in rows]
    stages.save_rows(rows, folder)
    num_failed = sum(row["error"] is not None for row in rows)
    spans = [*spans, watch.span("write")]
    return pack(Finished(len(rows), num_failed, spans, CacheUse.of(rows), Reuse.of(rows)))
