"""The inference job: plan a run, watch the pipeline answer it, report what came out.

    config -> plan_inference -> InferenceRun -> run_inference -> Summary, report.html, run.json

Planning finds every mistake that can be found without a model and what an earlier run left to do.
The answers themselves are in the output folder; the driver sees a few numbers of each chunk, and at the end
reads the rows back, a part at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from importlib import metadata

import numpy as np
import pyarrow as pa
import ray

from vlmray import __version__, cluster
from vlmray.config import InferConfig
from vlmray.dataset.slices import mask_rows, row_indices
from vlmray.dataset.sources import display_name
from vlmray.inference.certainty.gathering import Confidences
from vlmray.inference.chunks import Finished
from vlmray.inference.drawing.gathering import COLUMNS as DRAWN_COLUMNS
from vlmray.inference.drawing.gathering import Draws
from vlmray.inference.endpoint.checking import check_server
from vlmray.inference.endpoint.watching import saying_how_the_server_is
from vlmray.inference.passing import pass_on
from vlmray.inference.pipeline import count_chunks, iter_finished
from vlmray.inference.plan import InferenceError, InferenceRun
from vlmray.inference.report import Report, render_html
from vlmray.inference.summary import GalleryChoice, Summary, Tally, Usage
from vlmray.inference.timeline import Timeline
from vlmray.reports.bar import AHEAD, Forecast, write_above_bar
from vlmray.reports.errors import Causes
from vlmray.reports.gallery import GalleryItem
from vlmray.schema import Row

_REPLICA = "_Replica"
"""What its actors are called, by Ray too."""

_SUMMARY_COLUMNS = (
    "sample_id", "family", "score", "error", "num_prompt_tokens", "num_completion_tokens", "parsed",
    "keeps_form", "confidence", "row_index",
)  # fmt: skip


def run_inference(run: InferenceRun) -> Summary:
    """Answer the pending rows, write report and manifest, pass on what is to be; return the run in numbers.

    Raises:
        ValueError: the cluster has not the GPUs asked for.
        InferenceError: a replica failed, or more rows failed than `--max_errors` allows.
        PushError, TrackerError: the hub, or a tracker, did not take what is written.
    """
    started = time.perf_counter()
    timeline, done, replicas = Timeline(), Finished(0, 0, []), None
    with cluster.ending_actors(_REPLICA):
        if run.pending:
            replicas = _plan_replicas(run)
            cluster.tell_if_taken(cpus=cluster.cpus_per_task())
            done = _consume(run, replicas, timeline)
        return _conclude(run, time.perf_counter() - started, timeline, done, replicas)


def describe(run: InferenceRun) -> list[tuple[str, str]]:
    """Say what a run would do and where, without doing it; lines of a title and a text.

    Raises:
        ValueError: the cluster has not the GPUs asked for.
    """
    done, often = len(run.selected) - len(run.pending), run.task.num_samples
    to_answer = f"{len(run.pending):,} to answer" + (f", {often} times each" if often > 1 else "")
    lines = [
        ("rows", f"{len(run.selected):,}: {done:,} answered already, {to_answer}"),
        ("engine", f"{run.choice.engine} ({run.choice.reason})"),
        ("outputs", f"{run.folder.uri} ({run.folder.output_format})"),
        *([("answer cache", run.cache.uri)] if run.cache else []),
        *([("pushed to", run.repo.url)] if run.repo else []),
    ]
    if run.pending:
        replicas = _plan_replicas(run)
        lines[1:1] = cluster.preview(_asked(run, replicas), replicas.max_replicas)
    return lines


def _plan_replicas(run: InferenceRun) -> cluster.ReplicaPlan:
    if run.config.engine == "openai":
        check_server(run.config)
        cluster.connect(run.config.log_level)
        return cluster.plan_clients(run.config.replica_range())
    cluster.connect(run.config.log_level)
    return cluster.plan_replicas(run.config.replica_range(), run.config.gpus_per_replica, run.config.cards)


def _asked(run: InferenceRun, replicas: cluster.ReplicaPlan) -> cluster.Asked:
    num_chunks = count_chunks(run, replicas)
    return replicas.asked(_REPLICA, min(replicas.min_replicas, num_chunks))


def _consume(run: InferenceRun, replicas: cluster.ReplicaPlan, timeline: Timeline) -> Finished:
    """Pull the pipeline to its end, show how far it is, and note when which stage worked."""
    total = Finished(0, 0, [])
    price = run.config.price_per_hour
    forecast = Forecast(len(run.pending), None if price is None else price * _units(replicas))
    try:
        with (
            run.open_bar(form=AHEAD) as bar,
            cluster.saying_what_is_awaited(
                _asked(run, replicas), run.config.wait_for_resources_s, say=write_above_bar
            ),
            saying_how_the_server_is(run.config, say=write_above_bar),
            contextlib.closing(iter_finished(run, replicas)) as chunks,
        ):
            for chunk in chunks:
                timeline.add(chunk.spans)
                total = total.plus(chunk)
                num_replicas = min(len(timeline.replicas), replicas.max_replicas)  # lost ones come again
                forecast.add(chunk.num_rows, num_replicas, begun_s=chunk.begun_s)
                bar.set_postfix({"failed": total.num_failed, **forecast.words()}, refresh=False)
                bar.update(chunk.num_rows)
                run.check_errors(total.num_failed)
    except ray.exceptions.RayError as error:
        done = f"{bar.n:,.0f} of {bar.total:,} rows are answered"
        raise InferenceError(f"{cluster.root_cause(error)}; {done}") from error
    return total


def _conclude(
    run: InferenceRun, elapsed_s: float, timeline: Timeline, done: Finished,
    replicas: cluster.ReplicaPlan | None,
) -> Summary:  # fmt: skip
    """Read the results back, write the report and, last, the manifest."""
    tally = Tally(run.task.metric if run.spec.has_answers else None)
    causes, gallery = Causes(), GalleryChoice()
    confidences, draws = Confidences(), Draws(run.task.num_samples)
    for row, is_resumed in _results(run):
        tally.add(row, is_resumed=is_resumed)
        causes.add(row)
        gallery.add(row)
        confidences.add(row)
        draws.add(row)
    if tally.num_rows != len(run.selected):
        raise InferenceError(
            f"{len(run.selected)} rows in, {tally.num_rows} results; run the same command again"
        )
    usage = _usage(run, replicas, timeline, done, tally.num_new)
    summary = tally.summary(
        elapsed_s, usage, confidences.assess(run), reuse=done.reuse, drawn=draws.assess(run)
    )
    options = dataclasses.asdict(run.config)
    report = Report(
        title=_title(run.config),
        summary=summary,
        options=options,
        timeline=timeline,
        errors=causes.groups(),
        gallery=_gallery(run, [row["sample_id"] for row in gallery.chosen()]),
    )
    overlap = timeline.overlap()
    manifest = {
        "vlmray": __version__,
        "versions": {name: metadata.version(name) for name in ("ray", "torch", "transformers", "pyarrow")},
        "options": options,
        "engine": {"name": run.choice.engine, "because": run.choice.reason},
        "summary": dataclasses.asdict(summary),
        "stages_s": timeline.stage_seconds(),
        "overlap": overlap and dataclasses.asdict(overlap),
    }
    if run.spec.form == "request":
        from vlmray.inference.requests.output import write_output  # which loads the protocol

        write_output(run)
    run.folder.finish(manifest, render_html(report))
    pass_on(run, summary)
    return summary


def _results(run: InferenceRun) -> Iterator[tuple[Row, bool]]:
    """Yield the results of the selection, each with whether an earlier run left it."""
    selected, pending = (mask_rows(rows, len(run.source)) for rows in (run.selected, run.pending))
    drawn = DRAWN_COLUMNS if run.task.num_samples > 1 else ()
    for table in run.folder.scan((*_SUMMARY_COLUMNS, *drawn)):
        indices = row_indices(table["sample_id"])
        known = (indices >= 0) & (indices < len(selected))
        places = np.where(known, indices, 0)
        wanted = known & selected[places]
        rows = table.filter(pa.array(wanted)).to_pylist()
        yield from zip(rows, (~pending[places[wanted]]).tolist(), strict=True)


def _usage(
    run: InferenceRun, replicas: cluster.ReplicaPlan | None, timeline: Timeline, done: Finished,
    num_answered: int,
) -> Usage | None:  # fmt: skip
    if replicas is None or not timeline.replicas:
        return None
    share = _units(replicas)
    return Usage.of(
        unit="GPU" if replicas.num_gpus else "replica",
        held_s=share * timeline.held_s(replicas.max_replicas),
        used_s=share * timeline.used_s(),
        num_answered=num_answered,
        price_per_hour=run.config.price_per_hour,
        cached_share=done.cache.share,
        energy_kwh=timeline.energy_kwh,
    )


def _units(replicas: cluster.ReplicaPlan) -> float:
    """Return what a replica is counted as: its GPUs, or itself where it has none."""
    return replicas.num_gpus or 1


def _title(config: InferConfig) -> str:
    model = config.model_id + (f" + {config.adapter}" if config.adapter else "")
    return f"{model} on {display_name(config.dataset_name, config.dataset_config)}"


def _gallery(run: InferenceRun, chosen: Sequence[str]) -> tuple[GalleryItem, ...]:
    found = {row["sample_id"]: row for row in run.folder.rows(sample_ids=chosen)}
    return tuple(GalleryItem.from_row(found[name], run.read_images(found[name])) for name in chosen)
