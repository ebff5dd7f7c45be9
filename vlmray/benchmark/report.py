"""A benchmark as a closing table, Markdown, JSON and an HTML page; measures nothing.

Results -> format_results, format_markdown, render_benchmark_html
"""

from __future__ import annotations

import dataclasses
import textwrap

from vlmray.benchmark.judge.report import judge_tables, ungraded_line
from vlmray.benchmark.scoreboard import GroupDifference, Scoreboard
from vlmray.benchmark.slices.report import describe_search, worse_galleries, worse_table
from vlmray.benchmark.speed import Percentiles
from vlmray.benchmark.verdicts import Results, format_p, format_range
from vlmray.config import BenchmarkConfig
from vlmray.inference.certainty.report import certainty_sections
from vlmray.inference.drawing.report import draw_sections, draw_table
from vlmray.metrics.significance import ALPHA, Interval, detectable, num_samples_for
from vlmray.reports.errors import error_table, option_table
from vlmray.reports.gallery import Gallery
from vlmray.reports.page import Fact, Page, Section, render_page
from vlmray.reports.plots import Plot, Series
from vlmray.reports.tables import Cell, Column, Mark, Table, ranged_cell
from vlmray.reports.text import TERMINAL_WIDTH, format_duration, format_percent, format_points, format_rate

# ---------------------------------------------------------------------------------------------
# Terminal and Markdown
# ---------------------------------------------------------------------------------------------


def format_results(results: Results) -> str:
    """Format the closing tables: plain text, at most 80 columns wide."""
    parts = []
    if results.board is not None:
        parts.append(_score_table(results.board, with_intervals=False).to_text())
    if results.speed:
        parts.append(_speed_table(results, short=True).to_text())
    missing = ungraded_line(results.judged) if results.judged else None
    said = [*results.verdicts, *results.thresholds, *(each.sentence for each in results.drawn), missing]
    parts += [textwrap.fill(line, TERMINAL_WIDTH) for line in said if line]
    return "\n\n".join(parts)


def format_markdown(results: Results) -> str:
    """Format scores, verdicts and speed for a README or a pull request."""
    parts = [*results.verdicts, *results.thresholds]
    if results.board is not None:
        parts.append(_score_table(results.board, with_intervals=True).to_markdown())
    if results.drawn:
        parts.append(draw_table(results.drawn).to_markdown())
    if results.speed:
        parts.append(_speed_table(results).to_markdown())
    return "\n\n".join(parts)


def format_plan(pilot: Scoreboard, config: BenchmarkConfig) -> str:
    """Format the plan with what it holds for: plain text, at most 80 columns wide."""
    table = plan_table(pilot, config)
    return f"{table.title}\n\n{table.to_text()}\n\n{textwrap.fill(table.note, TERMINAL_WIDTH)}"


_FEWEST_CHANGED = 10
"""With five the power that a pilot foretells was 7 points too high, with ten within 4 points."""


def plan_table(pilot: Scoreboard, config: BenchmarkConfig) -> Table:
    """Tell how many samples like those of a finished run would show what `--plan` and `--margin` name."""
    points, sizes = config.planned()
    rows = []
    note = "In 4 of 5 cases, if the samples are like these."
    for model in pilot.models[1:]:
        found = pilot.difference(model, pilot.metrics[0]).difference
        if (num_changed := found.num_gained + found.num_lost) < _FEWEST_CHANGED:
            note += f" Only {num_changed} scores of {model} differ, which is too few to plan well by."
        asked: list[tuple[str, float | None, int | None]] = [
            ("a difference", each / 100, num_samples_for(found, each / 100)) for each in points
        ]
        asked += [("a difference", detectable(found, size), size) for size in sizes]
        if (margin := config.margin) is not None:
            needed = num_samples_for(found, margin / 100, two_sided=False)
            asked.append(("not worse, if equal", margin / 100, needed))
        rows += [
            (
                f"{model}, {pilot.models[0]}",
                what,
                "–" if difference is None else f"{100 * difference:.1f}",
                "–" if size is None else f"{size:,}",
            )
            for what, difference, size in asked
        ]
    return Table(
        title=f"{pilot.metrics[0]}, by {pilot.num_samples:,} samples about {pilot.num_images:,} images",
        columns=(Column("compared"), Column("to be shown"), Column("points", True), Column("samples", True)),
        rows=tuple(rows),
        note=note,
    )


# ---------------------------------------------------------------------------------------------
# Page
# ---------------------------------------------------------------------------------------------

_GALLERIES = {
    "fixed": ("Fixed", "{base} is wrong, {other} is right or nearer."),
    "broken": ("Broken", "{base} is right or nearer, {other} is wrong."),
    "both wrong": ("Both wrong", "Neither scores full marks, and they score the same."),
    "wrong": ("Wrong", "Samples without full marks."),
}


def render_benchmark_html(results: Results) -> str:
    """Render the benchmark as one HTML page that needs nothing but itself."""
    sections: list[Section] = []
    board = results.board
    if board is not None:
        if results.verdicts:
            sections.append(_verdict_table(results))
        if board.margins:
            sections.append(_margin_table(board))
        sections.append(_score_table(board, with_intervals=True))
        if results.slices and results.slices.worse:
            sections.append(worse_table(board, results.slices))
            sections += worse_galleries(board.models[0], results.slices.worse, results.slice_items)
        sections += [breakdown_table(board, kind) for kind in board.kinds]
        sections += judge_tables(results.judged, board) if results.judged else []
    sections += [*draw_sections(results.drawn), *certainty_sections(results.certainty)]
    if results.speed:
        sections += [_speed_table(results), *_speed_plots(results)]
    sections += gallery_sections(results)
    sections += [
        dataclasses.replace(error_table(groups), title=f"Failed rows of {name} by cause")
        for name, groups in results.errors.items() if groups
    ]  # fmt: skip
    sections.append(_model_table(results))
    if results.options:
        sections.append(option_table(results.options))
    return render_page(
        Page(
            title=results.title, headline=_headline(results), facts=_facts(results), sections=tuple(sections)
        )
    )


def gallery_sections(results: Results) -> list[Gallery]:
    """Show samples that the second model changed, and those that neither gets right."""
    if results.board is None:
        return []
    names = results.board.models
    base, other = names[0], names[1 if len(names) > 1 else 0]
    galleries = []
    for kind, (number, items) in results.galleries.items():
        title, note = _GALLERIES[kind]
        shown = f" The prediction is that of {other}."
        shown += f" {len(items)} of {number:,} are shown." if len(items) < number else ""
        if items:
            note = note.format(base=base, other=other) + shown
            galleries.append(Gallery(title=title, items=tuple(items), note=note))
    return galleries


def _headline(results: Results) -> Fact:
    board = results.board
    if board is None:
        best = max(results.speed, key=lambda point: point.requests_per_s)
        return Fact(f"requests/s of {best.model}, at best", format_rate(best.requests_per_s))
    metric = board.metrics[0]
    base, *others = board.models
    if not others:
        return Fact(f"{metric} of {base}", format_percent(board.score(base, metric).mean))
    return Fact(results.verdicts[0], board.difference(others[0], metric).verdict.capitalize())


def _facts(results: Results) -> tuple[Fact, ...]:
    facts = [Fact("samples", f"{results.num_samples:,}")]
    if results.board is not None:
        facts.append(Fact("images", f"{results.board.num_images:,}"))
    for name, groups in results.errors.items():
        if groups:
            facts.append(Fact(f"failed of {name}", f"{sum(group.num_rows for group in groups):,}"))
    if results.speed:
        for name in dict.fromkeys(point.model for point in results.speed):
            best = max(p.requests_per_s for p in results.speed if p.model == name)
            facts.append(Fact(f"requests/s of {name}", format_rate(best), "at best"))
    return (*facts, Fact("elapsed", format_duration(results.elapsed_s)))


def _verdict_table(results: Results) -> Table:
    board = results.board
    assert board is not None
    rows = [
        _difference_row(f"{model}, {metric}", board.difference(model, metric))
        for metric in board.metrics
        for model in board.models[1:]
    ]
    rows += [
        _difference_row(f"{name}, against the earlier run", difference)
        for name, difference in results.against_baseline.items()
    ]
    looked_at = ""
    if results.slices and not results.slices.worse:
        looked_at = f" Slices on which one is worse: none found. {describe_search(results.slices)}"
    return Table(
        title=f"Against {board.models[0]}" if len(board.models) > 1 else "Against the earlier run",
        columns=_DIFFERENCE_COLUMNS,
        rows=tuple(rows),
        note=(
            "The first metric decides. Intervals: 95 %, bootstrap over images. p: paired permutation test "
            f"over images, corrected by Holm where several models are compared; below {ALPHA:.2f} it is a "
            "verdict. McNemar: exact test over samples, for scores of 0 and 1; it takes questions about one "
            f"image for independent.{looked_at}"
        ),
    )


def _margin_table(board: Scoreboard) -> Table:
    margin = 100 * board.margins[0].test.margin
    return Table(
        title=f"Not worse than {board.models[0]} by more than {margin:g} points",
        columns=(Column("model"), Column("verdict"), Column("95 % bound", True), Column("p", True)),
        rows=tuple(
            (
                found.model,
                Mark("right", "not worse") if found.holds else Mark("unscored", "not shown"),
                format_points(found.test.low),
                format_p(found.p_corrected),
            )
            for found in board.margins
        ),
        note=(
            f"{board.metrics[0]}; one-sided, bootstrap over images: the model is worse by no more than the "
            "bound. p is corrected by Holm where several models are compared."
        ),
    )


_DIFFERENCE_COLUMNS = (
    Column("compared"), Column("verdict"), Column("points", True), Column("95 % interval", True),
    Column("p", True), Column("McNemar", True), Column("gained", True), Column("lost", True),
)  # fmt: skip


def _difference_row(name: str, found: GroupDifference) -> tuple[str | Mark, ...]:
    difference = found.difference
    return (
        name,
        _MARKS[found.verdict],
        format_points(difference.mean),
        format_range(difference),
        format_p(found.p_corrected),
        "–" if difference.mcnemar_p is None else format_p(difference.mcnemar_p),
        f"{difference.num_gained:,}",
        f"{difference.num_lost:,}",
    )


def _score_table(board: Scoreboard, *, with_intervals: bool) -> Table:
    rows: list[tuple[str | Cell, ...]] = [
        (metric, *(_score_cell(board.score(model, metric), with_intervals) for model in board.models))
        for metric in board.metrics
    ]
    if board.bleu:
        rows.append(("bleu", *(f"{100 * score:.1f}" for score, _ in board.bleu.values())))
    signatures = "; ".join(sorted({signature for _, signature in board.bleu.values()}))
    note = f"BLEU is of the corpus, without an interval; by short answers it ranks nothing. {signatures}"
    return Table(
        title="Scores",
        columns=(Column("metric"), *(Column(model, True) for model in board.models)),
        rows=tuple(rows),
        note=note if board.bleu else "",
    )


def _score_cell(interval: Interval, with_intervals: bool) -> str | Cell:
    if not with_intervals:
        return format_percent(interval.mean)
    return ranged_cell(interval.mean, interval.low, interval.high)


def breakdown_table(board: Scoreboard, kind: str, *, short: bool = False) -> Table:
    """One row for each group and model compared with the first; the short one fits a terminal."""
    metric = board.metrics[0]
    base, *others = board.models
    rows: list[tuple[str | Cell | Mark, ...]] = []
    for group in board.groups(kind):
        score = board.score(base, metric, kind, group)
        first = (f"{score.num_samples:,}", _score_cell(score, not short))
        rows += [
            (
                group if len(others) == 1 else f"{group}: {model}",
                *first,
                _score_cell(board.score(model, metric, kind, group), not short),
                *_compared(board.difference(model, metric, kind, group), short),
            )
            for model in others
        ] or [(group, *first)]
    columns = [Column(kind), Column("samples", True), Column(base, True)]
    if others:
        p = Column("p", True)
        columns += [Column(others[0] if len(others) == 1 else "model", True), Column("points", True)]
        columns += [Column("95 % interval", True), p] if short else [p, Column("verdict")]
    return Table(
        title=f"{metric} by {kind}",
        columns=tuple(columns),
        rows=tuple(rows),
        note="p is corrected by Holm for all comparisons of this table." if others else "",
    )


def _compared(found: GroupDifference, short: bool) -> tuple[str | Mark, ...]:
    points, p_value = format_points(found.difference.mean), format_p(found.p_corrected)
    if short:
        return points, format_range(found.difference), p_value
    return points, p_value, _MARKS[found.verdict]


_MARKS = {
    "better": Mark("right", "better"),
    "worse": Mark("wrong", "worse"),
    "no significant change": Mark("unscored", "no significant change"),
    "too few images": Mark("unscored", "too few images"),
}


def _speed_table(results: Results, *, short: bool = False) -> Table:
    """One row for each load and model; the short one fits a terminal."""
    order = list(results.models)
    points = sorted(results.speed, key=lambda point: (point.load, order.index(point.model)))
    has_failed = any(point.num_failed for point in points)
    price = results.price_per_hour
    suffix = "p50" if short else "ms: p50 / p90 / p99"
    columns = [Column("model")]
    columns += [Column(label, True) for label in ("load", "requests/s", "tokens/s")]
    columns += [Column(f"{label} {suffix}", True) for label in ("first text,", "latency,")]
    columns += [Column("failed", True)] if has_failed else []
    columns += [Column("per 1,000", True)] if price is not None else []
    rows = []
    for point in points:
        row = [
            point.model,
            f"{point.load:g}",
            format_rate(point.requests_per_s),
            format_rate(point.tokens_per_s),
        ]
        row += [_times(found, short) for found in (point.ttft_ms, point.latency_ms)]
        row += [f"{point.num_failed:,}"] if has_failed else []
        row += [] if price is None else [f"{price / 3600 * 1000 / point.requests_per_s:.4g}"]
        rows.append(tuple(row))
    note = f"Load: {points[0].kind}. {points[0].num_requests:,} streamed requests each, after a warm-up."
    if price is not None:
        note += f" Cost of 1,000 samples at {price:g} an hour."
    return Table(title="Speed", columns=tuple(columns), rows=tuple(rows), note=note)


def _times(found: Percentiles | None, short: bool) -> str:
    if found is None:
        return "–"
    return f"{found[0]:,.0f} ms" if short else " / ".join(f"{value:,.0f}" for value in found)


def _speed_plots(results: Results) -> list[Plot]:
    """Draw latency against throughput: each load is a dot, each model a line."""
    if len({point.load for point in results.speed}) < 2:
        return []

    def series(model: str, place: int) -> Series:
        points = tuple(
            (point.requests_per_s, point.latency_ms[place] / 1000)
            for point in results.speed
            if point.model == model and point.latency_ms is not None
        )
        return Series(name=model, points=points, style="dots")

    models = list(dict.fromkeys(point.model for point in results.speed))
    return [
        Plot(
            title=f"Latency against throughput, {name}",
            x_label="requests/s",
            y_label="latency, s",
            series=tuple(series(model, place) for model in models),
            y_include=(0.0,),
        )
        for name, place in (("median", 0), ("p99", 2))
    ]


def _model_table(results: Results) -> Table:
    return Table(
        title="Models",
        columns=(Column("name"), Column("model")),
        rows=tuple(results.models.items()),
        collapsed=True,
    )
