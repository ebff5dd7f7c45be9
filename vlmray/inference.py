"""Batch inference on Ray Data: read, prepare, generate on a pool of model replicas, score, write.

    read + prepare (CPU tasks) -> generate (actors that hold the model) -> score + write (CPU tasks)
                                                                              |
    progress, failures, closing table  <- a few numbers per row -- the driver

The pipeline streams: what is in flight is bounded, whatever the size of the dataset, and neither
images nor texts pass through the driver. A chunk of rows is the unit of work and of loss: a replica
that dies has its chunk generated again elsewhere, a run that dies loses the chunks in flight. A chunk
travels as one Arrow row that holds its samples, so Ray neither merges chunks nor splits them.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from tqdm import tqdm

from vlmray import __version__, checkpoints, cluster, hub, stages
from vlmray.config import InferConfig
from vlmray.dataset import DatasetSpec, get_dataset_columns, parse_sample_slices, sample_id
from vlmray.engines import TINY_RANDOM, build_engine, resolve_model_id
from vlmray.metrics import METRICS
from vlmray.outputs import OutputDirectory, prepare_output_directory
from vlmray.page import GalleryItem
from vlmray.prompts import check_prompt_template
from vlmray.report import Report, Summary, choose_gallery, group_errors, render_html, summarize
from vlmray.sources import Source, open_source
from vlmray.stages import ROW_SCHEMA, STAGES, Row, Task

_ENGINE_OPTIONS = (
    "engine", "model_id", "adapter", "quantization", "dtype", "batch_size", "min_pixels", "max_pixels",
    "trust_remote_code",
)  # fmt: skip
# What an answer depends on. The rest of the options says how fast it comes, or where it goes.
_ANSWER_OPTIONS = (
    "model_id", "adapter", "quantization", "dtype", "engine", "dataset_name", "dataset_config",
    "dataset_split", "max_new_tokens", "temperature", "top_p", "seed", "system_prompt", "min_pixels",
    "max_pixels", "output_format",
)  # fmt: skip

_BATCHES_PER_CHUNK = 4
"""Rows of like length are batched together within a chunk, so it holds several batches."""

_NUM_LOCAL_TASKS = 4
"""Reading or writing tasks at a time on the driver's machine."""

_MAX_TASK_RETRIES = 4
"""A row that kills its replica each time (a native crash, the kernel's OOM killer) must not do so forever."""

_SUMMARY_COLUMNS = ("sample_id", "family", "score", "error", "num_prompt_tokens", "num_completion_tokens")
_CHUNK_SCHEMA = pa.schema({"rows": pa.list_(pa.struct(list(ROW_SCHEMA)))})
_PROGRESS_COLUMNS = ("sample_id", "error", *(f"{stage}_s" for stage in STAGES))


class InferenceError(RuntimeError):
    """A run that could not go on; everything finished is in the output folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceRun:
    """A run before it starts: everything checked, nothing loaded."""

    config: InferConfig
    source: Source
    spec: DatasetSpec
    task: Task
    folder: OutputDirectory

    selected: Sequence[int]
    """Row indices of the selection."""

    pending: Sequence[int]
    """Row indices still to answer."""


def plan_inference(config: InferConfig) -> InferenceRun:
    """Open dataset and output folder, find what is left to do, and check all options against them.

    Raises:
        ValueError: an option does not fit the dataset, the model or the output folder.
        FileNotFoundError: the model or adapter is not there.
    """
    _check_model(config)
    source = open_source(config.dataset_name, config.dataset_split, config.dataset_config)
    spec = get_dataset_columns(
        config.dataset_name,
        source.column_names,
        dataset_config=config.dataset_config,
        image_column=config.image_column,
        question_column=config.question_column,
        answer_column=config.answer_column,
        family_column=config.family_column,
        prompt_template=config.prompt_template,
        metric=config.metric,
    )
    selected = parse_sample_slices(config.sample_slices, len(source))
    task = _task(config, spec)
    folder = prepare_output_directory(
        config.output_dir,
        _answer_options(config, spec),
        output_format=config.output_format,
        overwrite=config.overwrite,
    )
    finished = folder.finished()
    names = {index: sample_id(config.dataset_split, index) for index in selected}
    pending = [index for index in selected if not finished.get(names[index], False)]
    if pending:
        folder.reopen()
        folder.discard({names[index] for index in pending} & finished.keys())
    return InferenceRun(
        config=config, source=source, spec=spec, task=task, folder=folder, selected=selected, pending=pending
    )


def run_inference(run: InferenceRun) -> Summary:
    """Answer the pending rows, write report and manifest, and return the run in numbers.

    Raises:
        InferenceError: a replica failed, or more rows failed than `--max_errors` allows.
    """
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    if run.pending:
        cluster.connect(run.config.log_level)
        seconds = _consume(run, pipeline(run))
    return _conclude(run, time.perf_counter() - started, seconds)


def _check_model(config: InferConfig) -> None:
    """Check on the driver what a replica would only find after it started."""
    if config.engine == "fake":
        return
    if config.model_id != TINY_RANDOM:
        checkpoints.check_model_folder(config.model_id)
        if checkpoints.local_folder(config.model_id) is None:
            hub.check_reachable(config.model_id, "model", option="--model_id")
    if config.adapter:
        checkpoints.check_adapter_folder(config.adapter, resolve_model_id(config.model_id))


def _task(config: InferConfig, spec: DatasetSpec) -> Task:
    if spec.metric not in METRICS:
        raise ValueError(f"--metric {spec.metric!r} is unknown; known: {', '.join(METRICS)}")
    try:
        check_prompt_template(spec.prompt_template)
    except ValueError as error:
        raise ValueError(f"--prompt_template: {error}") from error
    return Task(
        prompt_template=spec.prompt_template,
        system_prompt=config.system_prompt,
        metric=spec.metric,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
    )


def _answer_options(config: InferConfig, spec: DatasetSpec) -> dict[str, Any]:
    options = {name: getattr(config, name) for name in _ANSWER_OPTIONS}
    checkpoint = {"model_fingerprint": checkpoints.fingerprint(config.model_id)}
    if config.adapter:
        checkpoint["adapter_fingerprint"] = checkpoints.fingerprint(config.adapter)
    return {**options, **checkpoint, **dataclasses.asdict(spec)}


def pipeline(run: InferenceRun) -> Dataset:
    """Wire the stages; nothing runs until the result is consumed."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    replicas = cluster.plan_replicas(run.config.replica_range(), run.config.gpus_per_replica)
    chunk_size = _chunk_size(len(run.pending), run.config.batch_size, replicas.max_replicas)
    num_chunks = -(-len(run.pending) // chunk_size)
    # Tasks tied to this machine ask for no CPU: the head of a cluster may offer none.
    few = TaskPoolStrategy(_NUM_LOCAL_TASKS)
    here: dict[str, Any] = {"label_selector": cluster.driver_node(), "num_cpus": 0, "compute": few}
    anywhere = {"num_cpus": cluster.cpus_per_task()}
    rows = ray.data.read_datasource(
        _RowSource(run, chunk_size),
        override_num_blocks=num_chunks,
        **(here if run.source.on_driver else anywhere),
    )
    keep_images = run.config.output_format != "parquet"
    rows = _map(rows, functools.partial(_prepare, task=run.task, keep_images=keep_images), **anywhere)
    rows = _map(
        rows,
        _Replica,
        fn_constructor_kwargs={"engine": _engine_options(run.config, replicas), "task": run.task},
        compute=ActorPoolStrategy(
            min_size=min(replicas.min_replicas, num_chunks),
            max_size=min(replicas.max_replicas, num_chunks),
        ),
        num_cpus=replicas.num_cpus,
        num_gpus=replicas.num_gpus,
        max_task_retries=_MAX_TASK_RETRIES,
    )
    finish = functools.partial(_score_and_save, task=run.task, folder=run.folder)
    return _map(rows, finish, **(here if run.folder.is_local else anywhere))


def _map(rows: Dataset, fn: Any, **options: Any) -> Dataset:
    return rows.map_batches(fn, batch_size=1, batch_format="pyarrow", **options)


def _chunk_size(num_rows: int, batch_size: int, num_replicas: int) -> int:
    """Rows of one unit of work: several batches, but enough units to keep all replicas busy to the end."""
    per_replica = -(-num_rows // (4 * num_replicas))
    return max(1, min(_BATCHES_PER_CHUNK * batch_size, max(batch_size, per_replica)))


def _engine_options(config: InferConfig, replicas: cluster.ReplicaPlan) -> dict[str, Any]:
    options = {name: getattr(config, name) for name in _ENGINE_OPTIONS}
    return {**options, "num_threads": replicas.num_threads}


class _RowSource(Datasource):
    """A source as Ray Data reads it: one task for each chunk of the pending rows."""

    def __init__(self, run: InferenceRun, chunk_size: int) -> None:
        super().__init__()
        self._run = run
        self._chunk_size = chunk_size

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
            )  # fmt: skip
            metadata = BlockMetadata(
                num_rows=min(size, len(pending) - start), size_bytes=None, input_files=None, exec_stats=None
            )
            tasks.append(ReadTask(read, metadata))
        return tasks


def _read(
    source: ray.ObjectRef, spec: DatasetSpec, split: str, *, selected: Sequence[int], start: int, size: int
) -> Iterator[pa.Table]:
    rows = _timed("read", stages.read_chunk, ray.get(source), spec, split, selected, start, start + size)
    if rows:
        yield _pack(rows)


def _prepare(chunk: pa.Table, *, task: Task, keep_images: bool) -> pa.Table:
    prepare = functools.partial(stages.prepare_rows, keep_images=keep_images)
    return _pack(_timed("prepare", prepare, _unpack(chunk), task))


class _Replica:
    """An actor that holds the model."""

    def __init__(self, engine: Mapping[str, Any], task: Task) -> None:
        self._engine = build_engine(**engine)
        self._task = task

    def __call__(self, chunk: pa.Table) -> pa.Table:
        return _pack(_timed("generate", stages.generate_rows, _unpack(chunk), self._engine, self._task))


def _score_and_save(chunk: pa.Table, *, task: Task, folder: OutputDirectory) -> pa.Table:
    """Score and write rows, and leave of them what the driver counts."""

    def finish(rows: list[Row]) -> list[Row]:
        rows = [stages.score_row(row, task) for row in rows]
        stages.save_rows(rows, folder)
        return rows

    rows = _timed("write", finish, _unpack(chunk))
    return _pack([{name: row.get(name) for name in _PROGRESS_COLUMNS} for row in rows])


def _timed(stage: str, function: Callable[..., list[Row]], *args: Any) -> list[Row]:
    """Run a stage on rows and note each row's share of the time it took."""
    started = time.perf_counter()
    rows = function(*args)
    share = (time.perf_counter() - started) / max(1, len(rows))
    return [{**row, f"{stage}_s": share} for row in rows]


def _pack(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist([{"rows": rows}], _CHUNK_SCHEMA)


def _unpack(chunk: pa.Table) -> list[Row]:
    (rows,) = chunk["rows"].to_pylist()
    return rows


def iter_finished(results: Dataset) -> Iterator[list[Row]]:
    """Run the pipeline; yield of each chunk, once it is written, ids, errors and seconds by stage."""
    for chunk in results.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
        yield _unpack(chunk)


def _consume(run: InferenceRun, results: Dataset) -> dict[str, float]:
    """Pull the pipeline to its end, show how far it is, and return the seconds of work by stage."""
    seconds = dict.fromkeys(STAGES, 0.0)
    num_failed = 0
    try:
        with _progress_bar(run) as bar:
            for rows in iter_finished(results):
                num_failed += sum(row["error"] is not None for row in rows)
                for stage in seconds:
                    seconds[stage] += sum(row[f"{stage}_s"] or 0.0 for row in rows)
                bar.set_postfix(failed=num_failed, refresh=False)
                bar.update(len(rows))
                _check_errors(num_failed, run.config.max_errors)
    except ray.exceptions.RayError as error:
        raise InferenceError(_root_cause(error)) from error
    return seconds


def _check_errors(num_failed: int, max_errors: int | None) -> None:
    if max_errors is not None and num_failed > max_errors:
        raise InferenceError(f"{num_failed} rows failed, --max_errors allows {max_errors}")


def _progress_bar(run: InferenceRun) -> tqdm:
    # In a file or a job's log every refresh is a line of its own, so there are few of them.
    interval = 0.2 if sys.stderr.isatty() else 15
    done = len(run.selected) - len(run.pending)
    return tqdm(
        total=len(run.selected),
        initial=done,
        unit=" samples",
        mininterval=interval,
        dynamic_ncols=True,
        smoothing=0,
    )


def _root_cause(error: BaseException) -> str:
    """Name what went wrong in a worker, without the layers that carried it here."""
    while (cause := getattr(error, "cause", None)) is not None:
        error = cause
    # The error of an actor that died while starting is a whole traceback, what was raised last in it.
    lines = str(error).strip().splitlines() or [""]
    return lines[-1] if len(lines) > 1 else f"{type(error).__name__}: {lines[0]}"


def _conclude(run: InferenceRun, elapsed_s: float, seconds: Mapping[str, float]) -> Summary:
    """Read the results back, write the report and, last, the manifest."""
    names = pa.array([sample_id(run.config.dataset_split, index) for index in run.selected], pa.string())
    results = run.folder.read_results(_SUMMARY_COLUMNS)
    rows = results.filter(pc.is_in(results["sample_id"], names)).to_pylist()
    if len(rows) != len(run.selected):
        raise InferenceError(f"{len(run.selected)} rows in, {len(rows)} results; run the same command again")
    pending = {sample_id(run.config.dataset_split, index) for index in run.pending}
    summary = summarize(
        rows,
        metric=run.task.metric if run.spec.answer_column else None,
        elapsed_s=elapsed_s,
        resumed_ids={row["sample_id"] for row in rows} - pending,
    )
    options = dataclasses.asdict(run.config)
    report = Report(
        title=f"{run.config.model_id} on {run.config.dataset_name}",
        summary=summary,
        options=options,
        stages=seconds,
        errors=group_errors(rows),
        gallery=_gallery(run, rows),
    )
    manifest = {
        "vlmray": __version__,
        "versions": {name: metadata.version(name) for name in ("ray", "torch", "transformers", "pyarrow")},
        "options": options,
        "summary": dataclasses.asdict(summary),
        "stages_s": dict(seconds),
    }
    run.folder.finish(manifest, render_html(report))
    return summary


def _gallery(run: InferenceRun, rows: Sequence[Row]) -> tuple[GalleryItem, ...]:
    chosen = [row["sample_id"] for row in choose_gallery(rows)]
    table = run.folder.read_results()
    table = table.filter(pc.is_in(table["sample_id"], pa.array(chosen, pa.string())))
    by_name = {row["sample_id"]: row for row in table.to_pylist()}
    return tuple(GalleryItem.from_row(by_name[name], _image_of(run, by_name[name])) for name in chosen)


def _image_of(run: InferenceRun, row: Row) -> bytes | None:
    """Return the image of a result: as written, or from its source where only Parquet was written."""
    image = run.folder.read_image(row["sample_id"])
    if image is not None or run.folder.output_format != "parquet" or row["error"]:
        return image
    index = row["row_index"]
    (source_row,) = stages.read_chunk(run.source, run.spec, run.config.dataset_split, [index], 0, 1)
    return source_row.get("image")
