"""The inference job: plan a run, watch the pipeline answer it, report what came out.

    config -> plan_inference -> InferenceRun -> run_inference -> Summary, report.html, run.json

Planning finds every mistake that can be found without a model and what an earlier run left to do.
The answers themselves are in the output folder; the driver sees a few values per row.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from importlib import metadata

import ray

from vlmray import __version__, cluster
from vlmray.config import InferConfig
from vlmray.dataset.slices import sample_id
from vlmray.dataset.sources import display_name
from vlmray.inference.pipeline import iter_finished
from vlmray.inference.plan import InferenceError, InferenceRun
from vlmray.inference.report import Report, render_html
from vlmray.inference.summary import Summary, choose_gallery, summarize
from vlmray.inference.timeline import Timeline
from vlmray.reports.errors import group_errors
from vlmray.reports.gallery import GalleryItem
from vlmray.schema import Row

_SUMMARY_COLUMNS = ("sample_id", "family", "score", "error", "num_prompt_tokens", "num_completion_tokens")


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
        cluster.tell_if_taken(
            cpus=replicas.min_replicas * replicas.num_cpus + cluster.cpus_per_task(),
            gpus=replicas.min_replicas * replicas.num_gpus,
        )
        _consume(run, replicas, timeline)
    return _conclude(run, time.perf_counter() - started, timeline)


def _consume(run: InferenceRun, replicas: cluster.ReplicaPlan, timeline: Timeline) -> None:
    """Pull the pipeline to its end, show how far it is, and note when which stage worked."""
    num_failed = 0
    try:
        with run.open_bar() as bar:
            for rows, spans in iter_finished(run, replicas):
                timeline.add(spans)
                num_failed += sum(row["error"] is not None for row in rows)
                bar.set_postfix(failed=num_failed, refresh=False)
                bar.update(len(rows))
                run.check_errors(num_failed)
    except ray.exceptions.RayError as error:
        done = f"{bar.n:,.0f} of {bar.total:,} rows are answered"
        raise InferenceError(f"{cluster.root_cause(error)}; {done}") from error


def _conclude(run: InferenceRun, elapsed_s: float, timeline: Timeline) -> Summary:
    """Read the results back, write the report and, last, the manifest."""
    names = [sample_id(run.config.dataset_split, index) for index in run.selected]
    rows = run.folder.rows(_SUMMARY_COLUMNS, sample_ids=names)
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
    found = {row["sample_id"]: row for row in run.folder.rows(sample_ids=chosen)}
    return tuple(GalleryItem.from_row(found[name], run.read_image(found[name])) for name in chosen)
