"""One inference run as a closing table and an HTML page; measures nothing.

    result rows -> summarize                    -> Summary -> format_table
                   group_errors, choose_gallery -> Report  -> render_html

Result rows are mappings with the keys `sample_id`, `family`, `score` (None where there is nothing to
compare with), `error` (None where the row was answered), `num_prompt_tokens`, `num_completion_tokens`;
the gallery also reads `question`, `answers` and `prediction`. All functions return text, so whoever
owns the output folder decides how it is written. How a page looks is up to `page.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any

from vlmray.inference.timeline import MAX_REPLICA_LANES, Overlap, Timeline
from vlmray.reports.lanes import LanePlot
from vlmray.reports.page import (
    Cell,
    Column,
    Fact,
    Gallery,
    GalleryItem,
    Page,
    Row,
    Table,
    Verdict,
    format_duration,
    format_percent,
    format_rate,
    read_number,
    render_page,
    shorten,
    verdict_of,
)

NO_FAMILY = "(no family)"


def _is_failed(row: Row) -> bool:
    return row.get("error") is not None


def _family_of(row: Row) -> str:
    return row.get("family") or NO_FAMILY


def _sorted_families(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (name == NO_FAMILY, name))


# ---------------------------------------------------------------------------------------------
# Summary: the arithmetic
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySummary:
    """Counts and score of one family of questions."""

    name: str
    num_rows: int
    num_answered: int
    num_failed: int
    num_scored: int
    score: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One run in numbers; `num_rows` is always `num_answered` + `num_failed`."""

    num_rows: int
    num_answered: int
    num_failed: int

    num_resumed: int
    """How many of the rows were taken over from an earlier run."""

    num_scored: int
    """Answered rows that have answers to compare with."""

    metric: str | None
    """Name of the metric; None where there are no answers to compare with."""

    score: float | None
    """Mean over the scored rows, 0 to 1; None where there are none."""

    score_with_failures: float | None
    """The same mean with each failed row that has answers counted as wrong."""

    families: tuple[FamilySummary, ...]
    """By name, rows without a family last; empty where no row has one."""

    elapsed_s: float
    """Wall-clock time of this run, model loading included."""

    samples_per_s: float | None
    """Rows answered in this run over `elapsed_s`; None where this run answered none."""

    tokens_per_s: float | None
    """Tokens written in this run over `elapsed_s`; prompts are not counted."""

    num_prompt_tokens: int
    num_completion_tokens: int


def summarize(
    rows: Iterable[Row], *, metric: str | None, elapsed_s: float, resumed_ids: Collection[str] = ()
) -> Summary:
    """Count rows, mean their scores and set the work of this run against its time.

    Args:
        rows: All result rows of the selection, those of earlier runs included.
        metric: Name of the metric behind `score`; None drops all scores.
        elapsed_s: Wall-clock time of this run.
        resumed_ids: Ids of rows from an earlier run; they count everywhere but in the rates.
    """
    rows = list(rows)
    resumed = frozenset(resumed_ids)
    answered = [row for row in rows if not _is_failed(row)]
    new = [row for row in answered if row["sample_id"] not in resumed]
    counts = _count(rows, metric)
    by_family: dict[str, list[Row]] = {}
    for row in rows:
        by_family.setdefault(_family_of(row), []).append(row)
    families = (
        FamilySummary(name=name, **_count(by_family[name], metric)) for name in _sorted_families(by_family)
    )
    return Summary(
        **counts,
        num_resumed=sum(row["sample_id"] in resumed for row in rows),
        metric=metric,
        score_with_failures=_score_with_failures(rows, metric),
        families=() if set(by_family) <= {NO_FAMILY} else tuple(families),
        elapsed_s=elapsed_s,
        samples_per_s=_rate(len(new), elapsed_s),
        tokens_per_s=_rate(_sum_tokens(new, "num_completion_tokens"), elapsed_s),
        num_prompt_tokens=_sum_tokens(answered, "num_prompt_tokens"),
        num_completion_tokens=_sum_tokens(answered, "num_completion_tokens"),
    )


def _count(rows: Sequence[Row], metric: str | None) -> dict[str, Any]:
    num_failed = sum(map(_is_failed, rows))
    scores = _scores(rows) if metric is not None else []
    return {
        "num_rows": len(rows),
        "num_answered": len(rows) - num_failed,
        "num_failed": num_failed,
        "num_scored": len(scores),
        "score": _mean(scores, len(scores)),
    }


def _score_with_failures(rows: Sequence[Row], metric: str | None) -> float | None:
    if metric is None:
        return None
    # A failed row without answers would not have been scored, so it is not a wrong answer either.
    # Rows that do not carry their answers are taken to have some.
    num_wrong = sum(_is_failed(row) and ("answers" not in row or _has_answers(row)) for row in rows)
    scores = _scores(rows)
    return _mean(scores, len(scores) + num_wrong)


def _has_answers(row: Row) -> bool:
    answers = row["answers"]
    return answers is not None and len(answers) > 0


def _scores(rows: Iterable[Row]) -> list[float]:
    scores = (read_number(row.get("score")) for row in rows if not _is_failed(row))
    return [score for score in scores if score is not None]


def _mean(values: Sequence[float], num_values: int) -> float | None:
    # fsum: the mean does not depend on the order in which workers finished.
    return math.fsum(values) / num_values if num_values else None


def _rate(amount: int, elapsed_s: float) -> float | None:
    return amount / elapsed_s if amount and elapsed_s > 0 else None


def _sum_tokens(rows: Iterable[Row], key: str) -> int:
    return sum(int(read_number(row.get(key)) or 0) for row in rows)


# ---------------------------------------------------------------------------------------------
# Errors by cause
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorGroup:
    """Failed rows whose messages differ only in numbers, names or paths."""

    cause: str
    """The message; its varying parts are `…` where the messages of the group differ."""

    sample_ids: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Count the rows of the group."""
        return len(self.sample_ids)


_VARYING = re.compile(r"0x[0-9a-f]+|'[^']*'|\"[^\"]*\"|(?:[\w.~-]*/)+[\w.~-]*|\d+(?:[.,]\d+)*", re.IGNORECASE)


def group_errors(rows: Iterable[Row]) -> tuple[ErrorGroup, ...]:
    """Group failed rows by cause, the most frequent cause first."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for row in sorted(filter(_is_failed, rows), key=lambda row: row["sample_id"]):
        sample_id, line = row["sample_id"], _telling_line(str(row["error"]))
        pattern = _VARYING.sub("…", line.replace(sample_id, "…"))
        groups.setdefault(pattern, []).append((sample_id, line))
    found = [
        ErrorGroup(
            cause=pattern if len({line for _, line in members}) > 1 else members[0][1],
            sample_ids=tuple(sample_id for sample_id, _ in members),
        )
        for pattern, members in groups.items()
    ]
    return tuple(sorted(found, key=lambda group: (-group.num_rows, group.cause)))


def _telling_line(error: str) -> str:
    """Take the line that names the cause: the last one of a traceback, else the first."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["no message"]
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


# ---------------------------------------------------------------------------------------------
# Gallery: which samples
# ---------------------------------------------------------------------------------------------


# Places kept for each group when all of them overflow: the wrong ones tell most, yet a gallery
# without a right one would hide what the model can do.
_GALLERY_SHARES: tuple[tuple[tuple[Verdict, ...], float], ...] = (
    (("wrong", "partial"), 0.5),
    (("failed",), 0.2),
    (("right", "unscored"), 0.3),
)


def choose_gallery(rows: Iterable[Row], limit: int = 60) -> list[Row]:
    """Choose rows to show: wrong ones first, then failed, then right ones, spread over families.

    The choice depends on the rows alone, not on their order. Wrong rows get half of the places,
    failed ones a fifth, right ones the rest; places one group leaves free go to the others.
    """
    groups: list[list[Row]] = [[] for _ in _GALLERY_SHARES]
    for row in rows:
        verdict = verdict_of(read_number(row.get("score")), row.get("error"))
        index = next(i for i, (verdicts, _) in enumerate(_GALLERY_SHARES) if verdict in verdicts)
        groups[index].append(row)
    sizes = [
        min(len(group), int(limit * share)) for group, (_, share) in zip(groups, _GALLERY_SHARES, strict=True)
    ]
    for index in (0, 2, 1):  # failed rows take what is left last: they look alike, and are listed by cause
        sizes[index] += max(0, min(len(groups[index]) - sizes[index], limit - sum(sizes)))
    return [row for group, size in zip(groups, sizes, strict=True) for row in _spread(group)[:size]]


def _spread(rows: Iterable[Row]) -> list[Row]:
    """Deal rows out family by family, so that any prefix shows all families about equally."""
    by_family: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["sample_id"]):
        by_family.setdefault(_family_of(row), []).append(row)
    dealt = zip_longest(*(by_family[name] for name in _sorted_families(by_family)))
    return [row for row in chain.from_iterable(dealt) if row is not None]


# ---------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One inference run as the renderers need it."""

    title: str
    """Model and dataset: `Qwen/Qwen2.5-VL-3B-Instruct on chartqa`."""

    summary: Summary
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the run as given; values of secret ones are not shown."""

    timeline: Timeline | None = None
    """When which stage worked in this run."""

    errors: tuple[ErrorGroup, ...] = ()
    gallery: tuple[GalleryItem, ...] = ()


def format_table(summary: Summary) -> str:
    """Format the closing table of a run: plain text, at most 80 columns wide."""
    lines = [_family_table(summary, with_total=True).to_text(), ""]
    resumed = f" ({summary.num_resumed:,} resumed)" if summary.num_resumed else ""
    lines.append(
        f"{summary.num_rows:,} rows in{resumed} = {summary.num_answered:,} answered"
        f" + {summary.num_failed:,} failed"
    )
    lines.append(", ".join(f"{fact.value} {fact.label}" for fact in _rate_facts(summary)))
    note = _score_note(summary)
    return "\n".join(lines + ([note] if note else []))


def render_html(report: Report) -> str:
    """Render the run as one HTML page that needs nothing but itself."""
    summary = report.summary
    sections: list[Table | LanePlot | Gallery] = []
    if summary.families:
        sections.append(_family_table(summary))
    if report.timeline and (overlap := report.timeline.overlap()):
        sections.append(_lane_plot(report.timeline, overlap, summary.num_resumed))
        sections.append(_stage_table(report.timeline.stage_seconds()))
    if report.gallery:
        sections.append(_run_gallery(report))
    if report.errors:
        sections.append(error_table(report.errors))
    if report.options:
        sections.append(option_table(report.options))
    return render_page(
        Page(
            title=report.title,
            headline=_headline(summary),
            facts=(*_count_facts(summary), *_rate_facts(summary)),
            sections=tuple(sections),
        )
    )


def _family_table(summary: Summary, *, with_total: bool = False) -> Table:
    rows: list[FamilySummary | Summary] = list(summary.families)
    rows += [summary] if with_total else []
    has_score = summary.metric is not None
    columns = [Column("family"), Column("rows", True), Column("answered", True), Column("failed", True)]
    columns += [Column(shorten(summary.metric, 24), True)] if summary.metric is not None else []
    return Table(
        title="By family" if summary.families else "Rows",
        columns=tuple(columns),
        rows=tuple(
            (
                row.name if isinstance(row, FamilySummary) else "all",
                f"{row.num_rows:,}",
                f"{row.num_answered:,}",
                f"{row.num_failed:,}",
                *([Cell(format_percent(row.score), row.score)] if has_score else []),
            )
            for row in rows
        ),
    )


def _lane_plot(timeline: Timeline, overlap: Overlap, num_resumed: int) -> LanePlot:
    num_replicas, busy = len(timeline.replicas), overlap.model_busy_share
    subject, in_all = (
        ("the model", "") if num_replicas == 1 else (f"the {num_replicas:,} replicas", " in all")
    )
    notes = [
        "A bar is as high as the share of its time in which the stage worked. Where generate is lower, the"
        " model waited: for rows, or for their images, which are encoded beside it."
    ]
    if num_replicas > MAX_REPLICA_LANES:
        notes.append("generate is the mean of the replicas.")
    if num_resumed:
        notes.append(f"Only the work of this run is shown: {num_resumed:,} rows are from an earlier one.")
    return LanePlot(
        title="Overlap of CPU and model",
        elapsed_s=timeline.elapsed_s,
        lanes=tuple(timeline.lanes()),
        lead=(
            f"Once loaded, {subject} worked {format_percent(busy)} of the time and waited"
            f" {format_percent(1 - busy)} ({format_duration(overlap.model_waited_s)}{in_all});"
            f" {format_percent(overlap.cpu_hidden_share)} of the CPU work (read, prepare, write) was hidden"
            " behind loading and answering."
        ),
        note=" ".join(notes),
    )


def _stage_table(stages: Mapping[str, float]) -> Table:
    longest = max(stages.values())
    return Table(
        title="Time by stage",
        columns=(Column("stage"), Column("time", True)),
        rows=tuple(
            (name, Cell(format_duration(seconds), seconds / longest if longest > 0 else 0.0))
            for name, seconds in stages.items()
        ),
        note="Stages can overlap and run on several workers, so they need not add up to the elapsed time.",
    )


def error_table(errors: Sequence[ErrorGroup], num_ids: int = 8) -> Table:
    """List causes with how many rows they hit, and the first few of these."""

    def list_ids(group: ErrorGroup) -> str:
        more = group.num_rows - num_ids
        return ", ".join(group.sample_ids[:num_ids]) + (f" and {more:,} more" if more > 0 else "")

    return Table(
        title="Failed rows by cause",
        columns=(Column("cause"), Column("rows", True), Column("samples")),
        rows=tuple((shorten(group.cause, 400), f"{group.num_rows:,}", list_ids(group)) for group in errors),
    )


def option_table(options: Mapping[str, Any]) -> Table:
    """List options, folded away; values of secret ones are hidden."""

    def text_of(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

    return Table(
        title="Options of this run",
        columns=(Column("option"), Column("value")),
        rows=tuple((name, text_of(_hide_secret(name, value))) for name, value in options.items()),
        collapsed=True,
    )


def _hide_secret(name: str, value: Any) -> Any:
    """Keep credentials out of a page that is made to be passed on."""
    is_secret = re.search(r"(^|[_-])(token|key|password|secret)$", name, re.IGNORECASE) is not None
    return "(hidden)" if is_secret and value else value


def _run_gallery(report: Report) -> Gallery:
    shown, total = len(report.gallery), report.summary.num_rows
    note = f"{shown:,} of {total:,} rows, picked to show what went wrong: their mix is not the score."
    return Gallery(title="Samples", items=report.gallery, note=note if shown < total else "")


def _headline(summary: Summary) -> Fact:
    if summary.metric is None:
        label = f"of {summary.num_rows:,} rows answered; there are no answers to compare with, so no score"
        return Fact(label, f"{summary.num_answered:,}")
    if summary.score is None:
        label = f"of {summary.num_rows:,} rows answered, none of them scored, so no {summary.metric}"
        return Fact(label, f"{summary.num_answered:,}")
    label = f"{summary.metric}, mean over {summary.num_scored:,} scored of {summary.num_rows:,} rows"
    return Fact(label, format_percent(summary.score), _score_note(summary))


def _score_note(summary: Summary) -> str:
    """Say what the score leaves out, where it leaves anything out."""
    notes = []
    if summary.num_failed and summary.score is not None and summary.score_with_failures is not None:
        notes.append(f"{format_percent(summary.score_with_failures)} if failed rows count as wrong.")
    num_unscored = summary.num_answered - summary.num_scored
    if summary.metric is not None and num_unscored:
        notes.append(f"{num_unscored:,} answered without a score.")
    return " ".join(notes)


def _count_facts(summary: Summary) -> list[Fact]:
    resumed = f"{summary.num_resumed:,} from an earlier run" if summary.num_resumed else ""
    return [
        Fact("rows in", f"{summary.num_rows:,}", resumed),
        Fact("answered", f"{summary.num_answered:,}"),
        Fact("failed", f"{summary.num_failed:,}"),
    ]


def _rate_facts(summary: Summary) -> list[Fact]:
    note = "model loading included"  # Of a short run that is most of the time, so its rates are low.
    return [
        Fact("samples/s", format_rate(summary.samples_per_s), note),
        Fact("tokens/s", format_rate(summary.tokens_per_s), note),
        Fact("elapsed", format_duration(summary.elapsed_s)),
    ]
