"""From answers to results: scores, differences, galleries, files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlmray import __version__
from vlmray.benchmark.baseline import EARLIER, PREDICTIONS
from vlmray.benchmark.judge.asking import Judged, judge_rows
from vlmray.benchmark.judge.report import ungraded_line
from vlmray.benchmark.judge.settings import JUDGE
from vlmray.benchmark.plan import RESULTS, Benchmark, BenchmarkError
from vlmray.benchmark.report import format_markdown, render_benchmark_html
from vlmray.benchmark.samples import SampleFacts, describe_samples
from vlmray.benchmark.scoreboard import (
    GroupDifference,
    Rows,
    Scoreboard,
    score_answer,
    score_models,
)
from vlmray.benchmark.slices.finding import SliceSearch, find_worse
from vlmray.benchmark.slices.groups import answer_type
from vlmray.benchmark.slices.report import cards_of_each
from vlmray.benchmark.speed import SpeedPoint
from vlmray.benchmark.verdicts import Results
from vlmray.dataset.sources import display_name
from vlmray.errors import OptionError
from vlmray.inference.certainty.assessing import Certainty, assess
from vlmray.inference.drawing.assessing import Drawn, DrawnRow, assess_draws
from vlmray.inference.plan import InferenceRun
from vlmray.metrics.significance import paired_difference
from vlmray.reports.errors import group_errors
from vlmray.reports.gallery import GalleryItem
from vlmray.schema import Row

_GALLERY_SIZE = 24

# ---------------------------------------------------------------------------------------------
# What came of it
# ---------------------------------------------------------------------------------------------


def conclude(benchmark: Benchmark, speed: Sequence[SpeedPoint], elapsed_s: float) -> Results:
    """Read the answers back, compare them, and write report and files."""
    config = benchmark.config
    rows = _read_rows(benchmark) if benchmark.metrics else {}
    judged = judge_rows(benchmark, rows) if benchmark.judge else None
    board = _scoreboard(benchmark, rows, judged) if benchmark.metrics else None
    slices = find_worse(board, benchmark.samples) if board and len(board.models) > 1 else None
    dataset = display_name(config.dataset_name, config.dataset_config)
    results = Results(
        title=f"{', '.join(rows or benchmark.runs)} on {dataset}",
        models={candidate.name: str(candidate) for candidate in benchmark.candidates},
        board=board,
        judged=judged,
        certainty=_certainty(benchmark, rows, board) if board else (),
        drawn=_drawn(benchmark, rows),
        against_baseline=_against_baseline(benchmark, board),
        speed=tuple(speed),
        price_per_hour=config.price_per_hour,
        errors={name: group_errors(found.values()) for name, found in rows.items()},
        num_samples=len(benchmark.samples),
        galleries=_galleries(benchmark, rows, board) if board else {},
        elapsed_s=elapsed_s,
        slices=slices if slices and slices.num_slices else None,
        slice_items=_slice_items(benchmark, rows, board, slices) if board and slices else (),
        options={
            field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init
        },
    )
    written = {
        "vlmray": __version__,
        **describe_samples(benchmark.configs, benchmark.runs, benchmark.samples),
        **results.to_json(),
        "options": dataclasses.asdict(config),
    }
    folder = benchmark.folder
    if board:
        folder.write_bytes(PREDICTIONS, _predictions(benchmark, rows, board))
    folder.write_text("report.md", format_markdown(results) + "\n")
    folder.write_text("report.html", render_benchmark_html(results))
    folder.write_text(RESULTS, json.dumps(written, indent=2, ensure_ascii=False) + "\n")
    return results


def _scoreboard(benchmark: Benchmark, rows: Rows, judged: Judged | None) -> Scoreboard:
    """Score what every model answered; a judge that graded no sample whole is left out, unless it decides.

    Raises:
        BenchmarkError: It does.
    """
    margin = benchmark.config.margin
    names = benchmark.metrics
    if judged and not judged.counted:
        if names[0] == JUDGE:
            problem = ungraded_line(judged) or "judge: all answers failed"
            raise BenchmarkError(f"{problem}, so nothing can be compared; the same command asks it again")
        names = tuple(name for name in names if name != JUDGE)
    return score_models(
        benchmark.samples, rows, names, margin=None if margin is None else margin / 100,
        grades=judged.grades if judged else {},
    )  # fmt: skip


def pilot(benchmark: Benchmark) -> Scoreboard:
    """Score a run that is finished, to plan another by it.

    Raises:
        ValueError: Answers are missing, or there is nothing to compare.
    """
    if len(benchmark.candidates) < 2:
        raise OptionError("plan", "is about a comparison", "name two --models")
    for name, run in benchmark.runs.items():
        if run.pending:
            raise OptionError(
                "plan",
                f"needs answers, and {len(run.pending):,} of the {len(run.selected):,} of {name} are missing",
                "run the same command without it first",
            )
    rows = _read_rows(benchmark)
    return _scoreboard(benchmark, rows, judge_rows(benchmark, rows) if benchmark.judge else None)


def _read_rows(benchmark: Benchmark) -> Rows:
    """Return the result rows by model and sample id."""
    names = [sample.sample_id for sample in benchmark.samples]
    rows: dict[str, dict[str, Row]] = {}
    for name, run in benchmark.runs.items():
        found = run.folder.rows(sample_ids=names)
        rows[name] = {row["sample_id"]: row for row in found}
        if len(rows[name]) != len(names):
            raise BenchmarkError(f"{name}: {len(names)} rows in, {len(rows[name])} answers")
    return rows


def _predictions(benchmark: Benchmark, rows: Rows, board: Scoreboard) -> bytes:
    """Write what every model said to every sample, with all scores, as Parquet."""
    table = []
    for model, found in rows.items():
        for sample in benchmark.samples:
            row = found[sample.sample_id]
            scored = row["error"] is None and sample.answers
            table.append(
                {
                    "model": model,
                    "sample_id": sample.sample_id,
                    "question": sample.question,
                    "answers": list(sample.answers),
                    "family": sample.family,
                    "image": sample.image,
                    "num_pixels": sample.num_pixels,
                    "prediction": row["prediction"],
                    "samples": row["samples"],
                    "sample_scores": row["sample_scores"],
                    "agreement": row["agreement"],
                    "error": row["error"],
                    "num_completion_tokens": row["num_completion_tokens"],
                    "confidence": row["confidence"],
                    "min_token_probability": row["min_token_probability"],
                    **{
                        name: board.answers[model, name].get(sample.sample_id) if scored else None
                        for name in board.metrics
                    },
                }
            )
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(table), sink)
    return bytes(sink.getvalue().to_pybytes())


def _certainty(benchmark: Benchmark, rows: Rows, board: Scoreboard) -> tuple[Certainty, ...]:
    """Compare what models were sure of with the deciding metric."""
    metric = board.metrics[0]
    scored = board.answers[board.models[0], metric]
    asked = [sample for sample in benchmark.samples if sample.sample_id in scored]
    found = (
        assess(
            (
                (row["confidence"], board.answers[model, metric][sample.sample_id], sample.image_key)
                for sample in asked
                if (row := rows[model][sample.sample_id])["error"] is None
            ),
            metric=metric, num_asked=len(asked), target=benchmark.config.target_accuracy, model=model,
        )
        for model in board.models
    )  # fmt: skip
    return tuple(each for each in found if each is not None)


def _drawn(benchmark: Benchmark, rows: Rows) -> tuple[Drawn, ...]:
    """Assess the draws of the models that have several, by the rule that scored them as they came.

    As everywhere in a comparison, a row that failed is wrong.
    """
    asked = [sample for sample in benchmark.samples if sample.answers]

    def draws_of(model: str, num_samples: int) -> Iterator[DrawnRow]:
        for sample in asked:
            row = rows[model][sample.sample_id]
            if row["error"] is None:
                yield DrawnRow(row["agreement"], row["score"], row["sample_scores"], sample.image_key)
            else:
                yield DrawnRow(None, 0.0, [0.0] * num_samples, sample.image_key)

    tasks = {model: benchmark.runs[model].task for model in rows}
    return tuple(
        assess_draws(
            [*draws_of(model, task.num_samples)], num_samples=task.num_samples, metric=task.metric,
            model=model,
        )
        for model, task in tasks.items() if task.num_samples > 1
    )  # fmt: skip


def _against_baseline(benchmark: Benchmark, board: Scoreboard | None) -> dict[str, GroupDifference]:
    """Compare each model with the one of its name in the earlier run, by the deciding metric."""
    if board is None or benchmark.baseline is None:
        return {}
    metric = board.metrics[0]
    samples = [sample for sample in benchmark.samples if sample.answers]
    found = {}
    for name in board.models:
        if name in benchmark.baseline:
            earlier = benchmark.baseline[name]
            before = [score_answer(metric, earlier[sample.sample_id], sample) for sample in samples]
            after = [board.answers[name, metric][sample.sample_id] for sample in samples]
            difference = paired_difference(before, after, [sample.image_key for sample in samples])
            found[name] = GroupDifference(
                model=name, base=EARLIER, metric=metric, kind="all", group="all", difference=difference,
                p_corrected=difference.p_value,
            )  # fmt: skip
    return found


def _galleries(benchmark: Benchmark, rows: Rows, board: Scoreboard) -> dict[str, Any]:
    """Choose samples that the first model and the second answer differently, or both wrong."""
    metric = board.metrics[0]
    base, *others = board.models
    other = others[0] if others else base
    chosen: dict[str, list[SampleFacts]] = {"fixed": [], "broken": [], "both wrong": []}
    for sample in benchmark.samples:
        if sample.sample_id not in board.answers[base, metric]:
            continue
        before, after = (board.answers[model, metric][sample.sample_id] for model in (base, other))
        kind = "fixed" if after > before else "broken" if after < before else "both wrong"
        if kind != "both wrong" or after < 1:
            chosen[kind].append(sample)
    if not others:
        chosen = {"wrong": chosen["both wrong"]}
    run = benchmark.runs[base]
    return {
        kind: (len(found), [_card(run, sample, rows, board, other) for sample in _spread(found)])
        for kind, found in chosen.items()
    }


def _slice_items(
    benchmark: Benchmark, rows: Rows, board: Scoreboard, slices: SliceSearch
) -> list[list[GalleryItem]]:
    """Choose samples that each slice lost."""
    run, samples = benchmark.runs[board.models[0]], {each.sample_id: each for each in benchmark.samples}
    size = cards_of_each(len(slices.worse))
    return [
        [
            _card(run, sample, rows, board, each.found.model)
            for sample in _spread([samples[name] for name in each.lost], size)
        ]
        for each in slices.worse
    ]


def _spread(samples: Sequence[SampleFacts], size: int = _GALLERY_SIZE) -> list[SampleFacts]:
    """Take evenly spaced ones, so that all parts of the dataset are seen."""
    step = max(1.0, len(samples) / size)
    return [samples[int(place * step)] for place in range(min(len(samples), size))]


def _card(run: InferenceRun, sample: SampleFacts, rows: Rows, board: Scoreboard, shown: str) -> GalleryItem:
    row = rows[shown][sample.sample_id]
    others = [name for name in board.models if name != shown]
    return GalleryItem(
        sample_id=sample.sample_id,
        question=sample.question,
        answers=sample.answers,
        prediction=row["prediction"],
        score=None if row["error"] else board.answers[shown, board.metrics[0]][sample.sample_id],
        error=row["error"],
        family=sample.family or answer_type(sample.answers),
        images=tuple(run.read_images(row)),
        beside=tuple((name, rows[name][sample.sample_id]["prediction"] or "(failed)") for name in others),
    )
