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

import ray
from tqdm import tqdm

from vlmray import __version__, cluster
from vlmray.config import InferConfig
from vlmray.dataset.rows import read_rows
from vlmray.dataset.slices import sample_id
from vlmray.dataset.sources import display_name
from vlmray.inference.pipeline import iter_finished
from vlmray.inference.plan import InferenceRun
from vlmray.inference.report import Report, render_html
from vlmray.inference.summary import Summary, choose_gallery, summarize
from vlmray.inference.timeline import Timeline
from vlmray.reports.errors import group_errors
from vlmray.reports.gallery import GalleryItem
from vlmray.schema import Row

_SUMMARY_COLUMNS = ("sample_id", "family", "score", "error", "num_prompt_tokens", "num_completion_tokens")


class InferenceError(RuntimeError):
    """A run that could not go on; everything finished is in the output folder."""


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
        title=_title(run.config),
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


def _title(config: InferConfig) -> str:
    model = config.model_id + (f" + {config.adapter}" if config.adapter else "")
    return f"{model} on {display_name(config.dataset_name, config.dataset_config)}"


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
    (source_row,) = read_rows(run.source, run.spec, run.config.dataset_split, [index])
    return source_row.get("image")
