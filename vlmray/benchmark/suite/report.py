"""Several comparisons as closing lines and as one page, which links the page of each."""

from __future__ import annotations

import textwrap

from vlmray.benchmark.slices.finding import name_slice
from vlmray.benchmark.suite.verdict import Finding, SuiteResults
from vlmray.benchmark.verdicts import format_p, format_range
from vlmray.reports.errors import option_table
from vlmray.reports.page import Fact, Page, render_page
from vlmray.reports.tables import Cell, Column, Mark, Table
from vlmray.reports.text import TERMINAL_WIDTH, format_duration, format_percent, format_points

_MARKS = {
    "better": "right",
    "not worse": "right",
    "worse": "wrong",
    "not shown": "unscored",
    "no significant change": "unscored",
    "too few images": "unscored",
}


def format_suite(results: SuiteResults) -> str:
    """Format the closing table and sentences: plain text, at most 80 columns wide."""
    parts = [_table(results, short=True).to_text()]
    parts += [textwrap.fill(sentence, TERMINAL_WIDTH) for sentence in results.sentences]
    return "\n\n".join(parts)


def format_suite_markdown(results: SuiteResults) -> str:
    """Format sentences and table for a pull request."""
    return "\n\n".join([*results.sentences, _table(results).to_markdown()])


def render_suite_html(results: SuiteResults) -> str:
    """Render one page that needs nothing but itself."""
    return render_page(
        Page(
            title=f"{', '.join(results.models)} on {len(results.results)} datasets",
            headline=_headline(results),
            facts=(
                Fact("datasets", f"{len(results.results):,}"),
                Fact("samples", f"{sum(each.num_samples for each in results.results.values()):,}"),
                Fact("elapsed", format_duration(results.elapsed_s)),
            ),
            links=tuple((name, f"{name}/report.html") for name in results.results),
            sections=(_table(results), *_slice_tables(results), option_table(results.options)),
        )
    )


def _headline(results: SuiteResults) -> Fact:
    if not results.sentences:
        return Fact("datasets", f"{len(results.results):,}")
    findings = results.of(results.models[1])
    counts = [
        f"{number} {verdict}"
        for verdict in _MARKS
        if (number := sum(each.verdict == verdict for each in findings))
    ]
    return Fact(results.sentences[0], ", ".join(counts).capitalize())


def _table(results: SuiteResults, *, short: bool = False) -> Table:
    """One row for each dataset and model; the short one fits a terminal."""
    base = results.models[0]
    columns = [Column("dataset"), Column("model"), Column(base, True), Column("points", True)]
    columns += [] if short else [Column("95 % interval", True)]
    columns += [Column("margin", True), Column("p", True), Column("verdict")]
    return Table(
        title=f"Against {base}",
        columns=tuple(columns),
        rows=tuple(_row(results, finding, short) for finding in results.findings),
        note=(
            "p: whether the model is worse by the margin, or differs where there is none; corrected by Holm "
            "for all rows. Of each dataset its deciding metric."
        ),
    )


def _slice_tables(results: SuiteResults) -> list[Table]:
    """Name the slices of all datasets on which models are worse; the report of each has samples of them."""
    rows = [
        (
            name,
            name_slice(each.found),
            each.found.model,
            format_points(each.found.difference.mean),
            format_range(each.found.difference),
            format_p(each.found.p_corrected),
        )
        for name, result in results.results.items() if result.slices
        for each in result.slices.worse
    ]  # fmt: skip
    columns = (
        Column("dataset"), Column("slice"), Column("model"), Column("points", True),
        Column("95 % interval", True), Column("p", True),
    )  # fmt: skip
    note = "p: one-sided, corrected by Holm for all slices of a dataset. Examples are in its report."
    return [Table(title="Where it got worse", columns=columns, rows=tuple(rows), note=note)] if rows else []


def _row(results: SuiteResults, finding: Finding, short: bool) -> tuple[str | Cell | Mark, ...]:
    board = results.results[finding.dataset].board
    assert board is not None
    difference = finding.difference.difference
    margin = "–" if finding.margin is None else f"{100 * finding.margin.test.margin:g}"
    return (
        finding.dataset,
        finding.model,
        format_percent(board.score(board.models[0], board.metrics[0]).mean),
        format_points(difference.mean),
        *(() if short else (format_range(difference),)),
        margin,
        format_p(finding.p_value),
        Mark(_MARKS[finding.verdict], finding.verdict),  # type: ignore[arg-type]
    )
