"""One inference run as a closing table and an HTML page; measures nothing.

    Summary, groups of errors, gallery, timeline -> Report -> format_table, render_html

All functions return text, so whoever owns the output folder decides how it is written. How a page looks is
up to `vlmray.reports`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmray.inference.certainty.report import certainty_sections
from vlmray.inference.drawing.report import draw_sections
from vlmray.inference.summary import FamilySummary, Summary, Usage
from vlmray.inference.timeline import MAX_REPLICA_LANES, Overlap, Timeline
from vlmray.reports.errors import ErrorGroup, error_table, option_table
from vlmray.reports.gallery import Gallery, GalleryItem
from vlmray.reports.lanes import LanePlot
from vlmray.reports.page import Fact, Page, Section, render_page
from vlmray.reports.tables import Cell, Column, Table
from vlmray.reports.text import TERMINAL_WIDTH, format_duration, format_percent, format_rate, shorten

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
    lines += [f"{fact.value} {fact.label}; {fact.note}" for fact in _form_facts(summary)]
    lines.append(", ".join(f"{fact.value} {fact.label}" for fact in _rate_facts(summary)))
    if summary.usage:
        both = (_usage_facts(summary.usage), _energy_facts(summary.usage))
        lines += [", ".join(f"{fact.value} {fact.label}" for fact in facts) for facts in both if facts]
    lines += [_fill(f"{fact.value} {fact.label}: {fact.note}") for fact in _reuse_facts(summary)]
    if summary.certainty and summary.certainty.threshold:
        lines.append(_fill(summary.certainty.sentence))
    if summary.drawn:
        lines.append(_fill(summary.drawn.sentence))
    note = _score_note(summary)
    return "\n".join(lines + ([note] if note else []))


def render_html(report: Report) -> str:
    """Render the run as one HTML page that needs nothing but itself."""
    summary = report.summary
    sections: list[Section] = []
    if summary.families:
        sections.append(_family_table(summary))
    sections += draw_sections([summary.drawn] if summary.drawn else [])
    sections += certainty_sections([summary.certainty] if summary.certainty else [])
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
            facts=(
                *_count_facts(summary),
                *_form_facts(summary),
                *_rate_facts(summary),
                *(_usage_facts(summary.usage) if summary.usage else ()),
                *(_energy_facts(summary.usage) if summary.usage else ()),
                *_reuse_facts(summary),
            ),
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


def _form_facts(summary: Summary) -> list[Fact]:
    if not summary.num_formed:
        return []
    label = f"of {summary.num_formed:,} answers keep the form asked for"
    return [Fact(label, f"{summary.num_keep_form:,}", f"{summary.num_parsed:,} parse as JSON")]


def _rate_facts(summary: Summary) -> list[Fact]:
    note = "model loading included"  # Of a short run that is most of the time, so its rates are low.
    return [
        Fact("samples/s", format_rate(summary.samples_per_s), note),
        Fact("tokens/s", format_rate(summary.tokens_per_s), note),
        Fact("elapsed", format_duration(summary.elapsed_s)),
    ]


def _reuse_facts(summary: Summary) -> list[Fact]:
    identical, cached = summary.num_identical, summary.num_from_cache
    sources = [f"{identical:,} from rows that ask the same"] if identical else []
    sources += [f"{cached:,} from the answer cache"] if cached else []
    note = f"{', '.join(sources)}; rates and cost count them"
    return [Fact("answers taken over", f"{identical + cached:,}", note)] if sources else []


def _fill(text: str) -> str:
    return textwrap.fill(text, TERMINAL_WIDTH)


def _usage_facts(usage: Usage) -> list[Fact]:
    unit, per_hour = usage.unit, usage.answers_per_hour
    cached = usage.cached_share
    from_cache = [] if cached is None else [Fact("of prompt tokens were cached", format_percent(cached))]
    cost = [] if usage.cost is None else [Fact("cost", f"{usage.cost:,.4g}", f"of the {unit}s held")]
    if usage.cost_of_1000 is not None:
        cost.append(Fact("for 1,000 answers", f"{usage.cost_of_1000:,.4g}"))
    return [
        Fact(f"{unit}-seconds held", f"{usage.held_s:,.0f}", "from loading to the run's last answer"),
        Fact("of them used", format_percent(usage.used_s / usage.held_s if usage.held_s else None)),
        Fact(f"answers per {unit}-hour", "n/a" if per_hour is None else f"{per_hour:,.0f}"),
        *from_cache,
        *cost,
    ]


def _energy_facts(usage: Usage) -> list[Fact]:
    if usage.energy_kwh is None:
        return []
    note = "from loading to the last answer; what others did on them counts too"
    facts = [Fact("kWh taken by the GPUs", f"{usage.energy_kwh:,.4g}", note)]
    if usage.energy_of_1000_wh is not None:
        facts.append(Fact("Wh for 1,000 answers", f"{usage.energy_of_1000_wh:,.4g}"))
    return facts
