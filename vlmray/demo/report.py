"""The demo's story as closing lines and as a page; every figure is the benchmark's or the training's."""

from __future__ import annotations

import dataclasses
import textwrap
from dataclasses import dataclass

from vlmray.benchmark.report import breakdown_table, gallery_sections
from vlmray.benchmark.scoreboard import GroupDifference, Scoreboard
from vlmray.benchmark.verdicts import Results, sentence
from vlmray.config import DemoConfig
from vlmray.finetune.report import plot_curves
from vlmray.finetune.results import TrainingReport
from vlmray.reports.errors import option_table
from vlmray.reports.page import Fact, Page, render_page
from vlmray.reports.tables import Table
from vlmray.reports.text import TERMINAL_WIDTH, format_duration, format_percent

TRAINING, COMPARISON = "lora", "comparison"
"""Folders of the two jobs, beside the report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """What was learned, and what it is worth."""

    config: DemoConfig
    training: TrainingReport
    results: Results
    elapsed_s: float

    @property
    def board(self) -> Scoreboard:
        """Scores of the model without the adapter and with it."""
        assert self.results.board is not None
        return self.results.board

    @property
    def gain(self) -> GroupDifference:
        """What the adapter changed in the family that was taught."""
        return self.board.difference(
            self.board.models[1], self.board.metrics[0], "family", self.config.family
        )


def format_demo(report: DemoReport) -> str:
    """Format the closing table and what it says of the family: plain text, at most 80 columns wide."""
    table = breakdown_table(report.board, "family", short=True).to_text()
    return f"{table}\n\n{textwrap.fill(sentence(report.gain), TERMINAL_WIDTH)}"


def render_demo_html(report: DemoReport) -> str:
    """Render the story as one HTML page; the two jobs' own reports are linked."""
    return render_page(
        Page(
            title=f"What LoRA taught builtin: {report.config.family}",
            headline=_headline(report),
            facts=_facts(report),
            links=(
                ("The training", f"{TRAINING}/report.html"),
                ("The comparison, with all breakdowns", f"{COMPARISON}/report.html"),
            ),
            sections=(
                _family_table(report),
                *plot_curves(report.training),
                *gallery_sections(report.results),
                option_table(dataclasses.asdict(report.config)),
            ),
        )
    )


def _headline(report: DemoReport) -> Fact:
    metric, family = report.board.metrics[0], report.config.family
    before, after = (report.board.score(name, metric, "family", family).mean for name in report.board.models)
    label = f"{metric} on {family}, from {format_percent(before)} without the adapter"
    return Fact(label, format_percent(after), sentence(report.gain))


def _facts(report: DemoReport) -> tuple[Fact, ...]:
    training = report.training
    share = training.num_trainable / training.num_parameters
    return (
        Fact("charts trained on", f"{training.num_samples:,}"),
        Fact("charts asked about", f"{report.board.num_images:,}", "held out of training"),
        Fact("parameters trained", f"{training.num_trainable:,}", f"{100 * share:.1f} % of all"),
        Fact("training", format_duration(training.elapsed_s)),
        Fact("elapsed", format_duration(report.elapsed_s), "with the comparison"),
    )


def _family_table(report: DemoReport) -> Table:
    """The benchmark's breakdown, with what was compared below it."""
    table = breakdown_table(report.board, "family")
    base, tuned = report.board.models
    asked = (
        f"{base} is the built-in model, {tuned} the same with the adapter. Both answered one question of "
        f"every family about each of {report.board.num_images:,} charts that training did not see."
    )
    return dataclasses.replace(table, note=f"{asked} {table.note}")
