"""A comparison says what the rows of two runs say, row by row."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from vlmray.demo.comparison import choose_changed, compare
from vlmray.demo.report import ComparisonReport, format_comparison, render_comparison_html
from vlmray.reports.gallery import GalleryItem
from vlmray.reports.text import TERMINAL_WIDTH

NAMES = ("base", "base + LoRA")


def row(number: int, score: float | None, family: str | None = "count", **values: Any) -> dict[str, Any]:
    return {
        "sample_id": f"test-{number:06d}", "family": family, "score": score, "error": None,
        "question": "How many?", "answers": ["3"], "prediction": "3" if score else "4", **values,
    }  # fmt: skip


BEFORE = [row(0, 0.0), row(1, 1.0), row(2, 0.0), row(3, 1.0, "list"), row(4, None, "list", error="broken")]
AFTER = [row(4, 1.0, "list"), row(3, 0.0, "list"), row(2, 1.0), row(1, 1.0), row(0, 1.0)]


def test_rows_are_compared_by_their_ids() -> None:
    comparison = compare(BEFORE, AFTER, names=NAMES, metric="exact_match")
    count, listed = comparison.families
    assert (count.name, count.num_rows, count.before, count.after) == ("count", 3, 1 / 3, 1.0)
    assert (count.num_gained, count.num_lost) == (2, 0)
    assert (listed.before, listed.after, listed.num_gained, listed.num_lost) == (0.5, 0.5, 1, 1)
    assert (comparison.total.num_rows, comparison.total.before, comparison.total.after) == (5, 0.4, 0.8)
    assert comparison.of("list") is listed


def test_a_failed_row_is_a_wrong_one() -> None:
    failed = [{**one, "score": None, "error": "gone"} for one in BEFORE]
    assert compare(BEFORE, failed, names=NAMES, metric="exact_match").total.after == 0


def test_other_rows_are_refused() -> None:
    for before, after in ((BEFORE, AFTER[1:]), (BEFORE[1:], AFTER), ([], [])):
        with pytest.raises(ValueError, match="did not answer the same rows"):
            compare(before, after, names=NAMES, metric="exact_match")


def test_the_table_fits_a_terminal_and_gives_gains_in_points() -> None:
    lines = format_comparison(compare(BEFORE, AFTER, names=NAMES, metric="exact_match")).splitlines()
    assert max(map(len, lines)) <= TERMINAL_WIDTH
    assert lines[0].split() == ["family", "rows", "base", "base", "+", "LoRA", "gain", "got", "right", "lost"]
    assert lines[2].split() == ["count", "3", "33.3", "%", "100.0", "%", "+66.7", "2", "0"]
    assert lines[-1].split() == ["all", "5", "40.0", "%", "80.0", "%", "+40.0", "3", "1"]


def test_changed_rows_of_the_focus_come_first() -> None:
    chosen = choose_changed(BEFORE, AFTER, "list", limit=4)
    assert [one["sample_id"] for one in chosen] == [
        "test-000003", "test-000004", "test-000000", "test-000002",
    ]  # fmt: skip
    assert len(choose_changed(BEFORE, AFTER, "no such family")) == 5


def test_the_page_shows_both_answers() -> None:
    comparison = compare(BEFORE, AFTER, names=NAMES, metric="exact_match")
    item = GalleryItem.from_row({**AFTER[0], "prediction": "now"})
    item = dataclasses.replace(item, beside=(("Without LoRA", "<b>then</b>"), ("Empty", "")))
    html = render_comparison_html(
        ComparisonReport(title="Gain", comparison=comparison, focus="count", gallery=(item,))
    )
    assert "now" in html
    assert "<dt>Without LoRA</dt>" in html
    assert "&lt;b&gt;then&lt;/b&gt;" in html
    assert "<b>then" not in html
    assert "100.0 %" in html
    assert "exact_match on count, from 33.3 %" in html
