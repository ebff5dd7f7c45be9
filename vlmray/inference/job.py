"""The inference job: plan a run, watch the pipeline answer it, report what came out.

    config -> plan_inference -> InferenceRun -> run_inference -> Summary, report.html, run.json

Planning finds every mistake that can be found without a model and what an earlier run left to do.
The answers themselves are in the output folder; the driver sees a few values per row.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import ray
from tqdm import tqdm

from vlmray import __version__, cluster
from vlmray.builtin.random_models import resolve_model_id
from vlmray.config import InferConfig
from vlmray.dataset.registry import DatasetSpec, sample_id
from vlmray.dataset.selection import check_model, open_questions
from vlmray.inference import stages
from vlmray.inference.pipeline import InferenceRun, iter_finished
from vlmray.inference.report import Report, Summary, choose_gallery, group_errors, render_html, summarize
from vlmray.inference.stages import Row, Task
from vlmray.inference.timeline import Timeline
from vlmray.models import checks
from vlmray.reports.page import GalleryItem
from vlmray.storage.run_folder import prepare_output_directory

# What an answer depends on. The rest of the options says how fast it comes, or where it goes.
_ANSWER_OPTIONS = (
    "model_id", "adapter", "quantization", "dtype", "engine", "dataset_name", "dataset_config",
    "dataset_split", "max_new_tokens", "temperature", "top_p", "seed", "system_prompt", "min_pixels",
    "max_pixels", "output_format",
)  # fmt: skip

_SUMMARY_COLUMNS = ("sample_id", "family", "score", "error", "num_prompt_tokens", "num_completion_tokens")


class InferenceError(RuntimeError):
    """A run that could not go on; everything finished is in the output folder."""


def plan_inference(config: InferConfig, *, endpoint: str | None = None) -> InferenceRun:
    """Open dataset and output folder, find what is left to do, and check all options against them.

    Args:
        config: The run's options.
        endpoint: A server that will answer, where `model_id` is a name it knows; nothing here can check it.

    Raises:
        ValueError: an option does not fit the dataset, the model or the output folder.
        FileNotFoundError: the model or adapter is not there.
    """
    if endpoint is None:
        _check_model(config)
    questions = open_questions(config, config.dataset_split, config.sample_slices)
    source, spec, selected = questions.source, questions.spec, questions.selected
    task = _task(config, spec)
    folder = prepare_output_directory(
        config.output_dir,
        {**_answer_options(config, spec), "endpoint": endpoint},
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
        ValueError: the cluster has not the GPUs asked for.
        InferenceError: a replica failed, or more rows failed than `--max_errors` allows.
    """
    started = time.perf_counter()
    timeline = Timeline()
    if run.pending:
        cluster.connect(run.config.log_level)
        replicas = cluster.plan_replicas(run.config.replica_range(), run.config.gpus_per_replica)
        _consume(run, replicas, timeline)
    return _conclude(run, time.perf_counter() - started, timeline)


def _check_model(config: InferConfig) -> None:
    """Check on the driver what a replica would only find after it started."""
    if config.engine == "fake":
        return
    check_model(config.model_id)
    if config.adapter:
        checks.check_adapter_folder(config.adapter, resolve_model_id(config.model_id))


def _task(config: InferConfig, spec: DatasetSpec) -> Task:
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
    checkpoint = {"model_fingerprint": checks.fingerprint(config.model_id)}
    if config.adapter:
        checkpoint["adapter_fingerprint"] = checks.fingerprint(config.adapter)
    return {**options, **checkpoint, **dataclasses.asdict(spec)}


def _consume(run: InferenceRun, replicas: cluster.ReplicaPlan, timeline: Timeline) -> None:
    """Pull the pipeline to its end, show how far it is, and note when which stage worked."""
    num_failed = 0
    try:
        with progress_bar(run) as bar:
            for rows, spans in iter_finished(run, replicas):
                timeline.add(spans)
                num_failed += sum(row["error"] is not None for row in rows)
                bar.set_postfix(failed=num_failed, refresh=False)
                bar.update(len(rows))
                check_errors(num_failed, run.config.max_errors)
    except ray.exceptions.RayError as error:
        raise InferenceError(cluster.root_cause(error)) from error


def check_errors(num_failed: int, max_errors: int | None) -> None:
    """Stop a run of which more rows failed than it allows.

    Raises:
        InferenceError: They have.
    """
    if max_errors is not None and num_failed > max_errors:
        raise InferenceError(f"{num_failed} rows failed, --max_errors allows {max_errors}")


def progress_bar(run: InferenceRun, name: str | None = None) -> tqdm:
    """Make the bar of a run, with what earlier runs did already on it."""
    # In a file or a job's log every refresh is a line of its own, so there are few of them.
    interval = 0.2 if sys.stderr.isatty() else 15
    done = len(run.selected) - len(run.pending)
    return tqdm(
        total=len(run.selected),
        initial=done,
        desc=name,
        unit=" samples",
        mininterval=interval,
        dynamic_ncols=True,
        smoothing=0,
    )


def _conclude(run: InferenceRun, elapsed_s: float, timeline: Timeline) -> Summary:
    """Read the results back, write the report and, last, the manifest."""
    names = [sample_id(run.config.dataset_split, index) for index in run.selected]
    rows = run.folder.read_results(_SUMMARY_COLUMNS, sample_ids=names).to_pylist()
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
        timeline=timeline,
        errors=group_errors(rows),
        gallery=_gallery(run, rows),
    )
    overlap = timeline.overlap()
    manifest = {
        "vlmray": __version__,
        "versions": {name: metadata.version(name) for name in ("ray", "torch", "transformers", "pyarrow")},
        "options": options,
        "summary": dataclasses.asdict(summary),
        "stages_s": timeline.stage_seconds(),
        "overlap": overlap and dataclasses.asdict(overlap),
    }
    run.folder.finish(manifest, render_html(report))
    return summary


def _gallery(run: InferenceRun, rows: Sequence[Row]) -> tuple[GalleryItem, ...]:
    chosen = [row["sample_id"] for row in choose_gallery(rows)]
    found = run.folder.read_results(sample_ids=chosen).to_pylist()
    by_name = {row["sample_id"]: row for row in found}
    return tuple(GalleryItem.from_row(by_name[name], _image_of(run, by_name[name])) for name in chosen)


def _image_of(run: InferenceRun, row: Row) -> bytes | None:
    """Return the image of a result: as written, or from its source where only Parquet was written."""
    image = run.folder.read_image(row["sample_id"])
    if image is not None or run.folder.output_format != "parquet" or row["error"]:
        return image
    index = row["row_index"]
    (source_row,) = stages.read_rows(run.source, run.spec, run.config.dataset_split, [index])
    return source_row.get("image")
