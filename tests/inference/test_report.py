"""The report says what the rows say."""

from __future__ import annotations

import html
import itertools
import math
import pickle
import random
import re
from collections.abc import Collection, Iterable
from typing import Any

import pytest

from vlmray.inference import report
from vlmray.inference.report import Report
from vlmray.inference.summary import GalleryChoice, Summary, Tally
from vlmray.inference.timeline import Span, Timeline
from vlmray.reports.errors import NO_FAMILY, NUM_IDS, Causes, group_errors
from vlmray.reports.gallery import GalleryItem, verdict_of
from vlmray.reports.text import TERMINAL_WIDTH, display_width


def make_row(
    index: int, *, score: float | None = 1.0, error: str | None = None, **values: Any
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "sample_id": f"test-{index:06d}",
        "family": "human",
        "question": "Which bar is the largest?",
        "answers": ["42"],
        "prediction": None if error else "42",
        "score": None if error else score,
        "error": error,
        "num_prompt_tokens": None if error else 400,
        "num_completion_tokens": None if error else 5,
    }
    return row | values


def summarize(
    rows: Iterable[dict[str, Any]],
    *,
    metric: str | None,
    elapsed_s: float,
    resumed_ids: Collection[str] = (),
) -> Summary:
    tally = Tally(metric)
    for row in rows:
        tally.add(row, is_resumed=row["sample_id"] in resumed_ids)
    return tally.summary(elapsed_s)


def choose_gallery(rows: Iterable[dict[str, Any]], limit: int = 60) -> list[dict[str, Any]]:
    choice = GalleryChoice(limit)
    for row in rows:
        choice.add(row)
    return choice.chosen()


def mixed_rows(num_rows: int = 90) -> list[dict[str, Any]]:
    """Wrong, failed and right rows in equal parts, over three families."""
    families = ("human", "augmented", None)
    rows = []
    for index in range(num_rows):
        error = f"ImageError: no image 'x{index}.png'" if index % 3 == 1 else None
        rows.append(make_row(index, score=index % 3 / 2, error=error, family=families[index // 3 % 3]))
    return rows


def make_report(rows: list[dict[str, Any]], **values: Any) -> Report:
    summary = summarize(rows, metric=values.pop("metric", "relaxed_accuracy"), elapsed_s=10.0)
    gallery = tuple(GalleryItem.from_row(row) for row in choose_gallery(rows))
    defaults: dict[str, Any] = {"errors": group_errors(rows), "gallery": gallery}
    return Report(title="tiny on charts", summary=summary, **(defaults | values))


def make_timeline(*spans: Span) -> Timeline:
    """Make a timeline; without spans, of stages that took no time."""
    timeline = Timeline()
    timeline.add(spans or [Span(stage, 1.0, 1.0) for stage in ("read", "load", "generate")])
    return timeline


def read_text(built: Report) -> str:
    """Render a report and take the text off the page."""
    main = report.render_html(built).split("<main>")[1].split("</main>")[0]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", main)).split())


# Summary


def test_summary_counts_every_row_once() -> None:
    summary = summarize(mixed_rows(), metric="relaxed_accuracy", elapsed_s=10.0)
    assert (summary.num_rows, summary.num_answered, summary.num_failed) == (90, 60, 30)
    assert summary.score == 0.5
    assert summary.score_with_failures == pytest.approx(1 / 3)
    assert [family.name for family in summary.families] == ["augmented", "human", NO_FAMILY]
    for name in ("num_rows", "num_answered", "num_failed", "num_scored"):
        assert sum(getattr(family, name) for family in summary.families) == getattr(summary, name)


def test_summary_does_not_depend_on_row_order() -> None:
    rows = mixed_rows()
    shuffled = random.Random(0).sample(rows, len(rows))
    summary = summarize(rows, metric="m", elapsed_s=1.0)
    assert summarize(shuffled, metric="m", elapsed_s=1.0) == summary


def test_a_mean_of_many_scores_is_that_of_all_at_once_in_any_order() -> None:
    rng = random.Random(4)
    scores = [rng.choice([0.0, 1.0, rng.random(), rng.random() * 1e-300, 0.1]) for _ in range(20_000)]
    rows = [make_row(index, score=score, family=str(index % 3)) for index, score in enumerate(scores)]
    summary = summarize(rows, metric="m", elapsed_s=1.0)
    assert summary.score == math.fsum(scores) / len(scores)
    for family in summary.families:
        own = scores[int(family.name) :: 3]
        assert family.score == math.fsum(own) / len(own)
    rng.shuffle(rows)
    assert summarize(rows, metric="m", elapsed_s=1.0) == summary


def test_what_is_counted_does_not_grow_with_the_rows() -> None:
    tally, choice, causes = Tally("m"), GalleryChoice(), Causes()
    sizes = []
    for row in (make_row(i, score=i / 7e4, error="E 1" if i % 5 == 0 else None) for i in range(60_000)):
        for counted in (tally, choice, causes):
            counted.add(row)
        if row["sample_id"] in ("test-015000", "test-059999"):
            sizes.append(len(pickle.dumps((tally, choice, causes))))
    assert sizes[1] < 1.1 * max(sizes[0], 40_000)


def test_rates_leave_out_earlier_runs_and_failed_rows() -> None:
    rows = [make_row(index) for index in range(10)] + [make_row(10, error="ValueError: empty question")]
    resumed = {row["sample_id"] for row in rows[:6]}
    summary = summarize(rows, metric="m", elapsed_s=2.0, resumed_ids=resumed)
    assert (summary.num_resumed, summary.num_answered) == (6, 10)
    assert summary.samples_per_s == 2.0
    assert summary.tokens_per_s == 10.0
    assert summary.num_completion_tokens == 50


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_rows_without_a_score_are_left_out_of_the_mean(missing: float | None) -> None:
    rows = [make_row(0, score=1.0), make_row(1, score=0.0), make_row(2, score=missing, answers=[])]
    summary = summarize(rows, metric="m", elapsed_s=1.0)
    assert (summary.score, summary.num_scored, summary.num_answered) == (0.5, 2, 3)
    assert "1 answered without a score" in report.format_table(summary)


def test_a_failed_row_without_answers_is_no_wrong_answer() -> None:
    rows = [make_row(0), make_row(1, error="E", answers=[]), make_row(2, error="E")]
    assert summarize(rows, metric="m", elapsed_s=1.0).score_with_failures == 0.5


@pytest.mark.parametrize("rows", [[], [make_row(0, error="E")], [make_row(0, score=None)]])
@pytest.mark.parametrize("metric", ["relaxed_accuracy", None])
@pytest.mark.parametrize("elapsed_s", [0.0, 3.0])
def test_nothing_to_divide_by(rows: list[dict[str, Any]], metric: str | None, elapsed_s: float) -> None:
    summary = summarize(rows, metric=metric, elapsed_s=elapsed_s)
    assert summary.score is None
    assert "rows in" in report.format_table(summary)
    built = make_report(rows, metric=metric, timeline=make_timeline(), options={})
    assert read_text(built).startswith("tiny on charts")


def test_no_families_no_family_table() -> None:
    summary = summarize([make_row(0, family=None)], metric="m", elapsed_s=1.0)
    assert summary.families == ()
    assert NO_FAMILY not in report.format_table(summary)


# Errors


def test_errors_group_by_cause_and_add_up() -> None:
    traceback = 'Traceback (most recent call last):\n  File "x.py", line 3\nTimeoutError: none after 3.5 s'
    rows = [
        make_row(index, error=f"ImageError: test-{index:06d}: no image '/data/{index}.png'")
        for index in range(5)
    ]
    rows += [make_row(7, error=traceback), make_row(8, error="TimeoutError: none after 20 s"), make_row(9)]
    rows += [make_row(6, error=" \n")]
    groups = group_errors(reversed(rows))
    assert [group.cause for group in groups] == [
        "ImageError: …: no image …",
        "TimeoutError: none after … s",
        "no message",
    ]
    assert [group.num_rows for group in groups] == [5, 2, 1]
    assert groups[0].sample_ids[0] == "test-000000"
    (group,) = group_errors(make_row(index, error="E") for index in reversed(range(30)))
    assert group.num_rows == 30
    assert group.sample_ids == tuple(f"test-{index:06d}" for index in range(NUM_IDS))


def test_one_message_is_shown_as_it_is() -> None:
    (group,) = group_errors([make_row(0, error="ImageError: no image 'a.png'")])
    assert group.cause == "ImageError: no image 'a.png'"


# Gallery


def all_at_once(rows: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """The same choice, with all rows at hand."""
    groups: list[list[dict[str, Any]]] = [[], [], []]
    for row in sorted(rows, key=lambda row: row["sample_id"]):
        verdict = verdict_of(row["score"], row["error"])
        groups[{"wrong": 0, "partial": 0, "failed": 1}.get(verdict, 2)].append(row)
    shares = (0.5, 0.2, 0.3)
    sizes = [min(len(group), int(limit * share)) for group, share in zip(groups, shares, strict=True)]
    for index in (0, 2, 1):
        sizes[index] += max(0, min(len(groups[index]) - sizes[index], limit - sum(sizes)))
    chosen = []
    for group, size in zip(groups, sizes, strict=True):
        families = sorted({row["family"] or "" for row in group}, key=lambda name: (not name, name))
        dealt = itertools.zip_longest(
            *([r for r in group if (r["family"] or "") == name] for name in families)
        )
        chosen += [row for row in itertools.chain.from_iterable(dealt) if row][:size]
    return chosen


def test_the_gallery_is_that_of_all_rows_at_once() -> None:
    rng = random.Random(5)
    for _ in range(100):
        families = [None, *map(str, range(rng.choice([1, 3, 40])))]
        rows = [
            make_row(
                index,
                score=rng.choice([0.0, 0.5, 1.0, None]),
                error=rng.choice(["E", None, None]),
                family=rng.choice(families),
            )
            for index in range(rng.randint(0, 200))
        ]
        rng.shuffle(rows)
        limit = rng.choice([0, 1, 5, 20, 300])
        assert choose_gallery(rows, limit) == all_at_once(rows, limit)


def test_gallery_order_and_spread() -> None:
    rows = mixed_rows()
    chosen = choose_gallery(random.Random(3).sample(rows, len(rows)), limit=30)
    verdicts = [verdict_of(row["score"], row["error"]) for row in chosen]
    assert verdicts == ["wrong"] * 15 + ["failed"] * 6 + ["right"] * 9
    for families in ([row["family"] for row in chosen[:15]], [row["family"] for row in chosen[15:21]]):
        assert len({families.count(name) for name in ("human", "augmented", None)}) == 1
    assert chosen == choose_gallery(rows, limit=30)


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 60, 500])
def test_gallery_fills_its_places(limit: int) -> None:
    for rows in (mixed_rows(), [make_row(index) for index in range(90)]):
        chosen = choose_gallery(rows, limit=limit)
        assert len(chosen) == min(limit, 90)
        assert len({row["sample_id"] for row in chosen}) == len(chosen)


# Report


def test_control_characters_do_not_reach_page_or_terminal() -> None:
    rows = [make_row(0, prediction="a\x00b\x1b[31m\ud800\nnext", family="f\x1b[2J")]
    rows += [make_row(1, error="E\ud800\x1b")]
    built = make_report(rows, options={"x": "\x07"})
    for text in (report.render_html(built), report.format_table(built.summary)):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", text)
        text.encode()


def test_page_says_what_happened() -> None:
    built = make_report(
        mixed_rows(),
        options={"hf_token": "hf_abc", "max_new_tokens": 512},
        timeline=make_timeline(
            Span("read", 5.0, 80.0), Span("load", 0.0, 20.0), Span("generate", 30.0, 100.0, 10.0)
        ),
    )
    text = read_text(built)
    for expected in (
        "50.0 %",
        "relaxed_accuracy, mean over 60 scored of 90 rows",
        "33.3 % if failed rows count as wrong.",
        "1 min 15 s",
        "Once loaded, the model worked 75.0 % of the time and waited 25.0 % (20.0 s);",
        "60 of 90 rows",
        "samples/s6.00model loading included",
        "max_new_tokens",
        "(hidden)",
    ):
        assert expected in text
    assert "hf_abc" not in report.render_html(built)


@pytest.mark.parametrize("name", ["a" * 300, "图表" * 60, "two words " * 30, "e\u0301" * 200, "line\nbreak"])
@pytest.mark.parametrize("metric", ["m", "an_extremely_long_name_of_a_metric_that_someone_made_up", None])
def test_closing_table_fits_the_terminal(name: str, metric: str | None) -> None:
    rows = [make_row(index, family=name) for index in range(1200)] + [make_row(1200, family="b", error="E")]
    table = report.format_table(summarize(rows, metric=metric, elapsed_s=12345.6))
    lines = table.splitlines()
    assert max(map(display_width, lines)) <= TERMINAL_WIDTH
    assert lines[4].split()[:4] == ["all", "1,201", "1,200", "1"]
    assert "1,201 rows in = 1,200 answered + 1 failed" in table


def test_page_says_whose_work_the_overlap_is() -> None:
    rows = [make_row(index) for index in range(9)]
    resumed = summarize(rows, metric="m", elapsed_s=1.0, resumed_ids={"test-000000", "test-000004"})
    spans = [Span("generate", 0.0, 1.0, replica=str(number)) for number in range(12)]
    built = Report(title="T", summary=resumed, timeline=make_timeline(*spans))
    assert "the 12 replicas worked 100.0 % of the time and waited 0.0 % (0.00 s in all)" in read_text(built)
    assert "generate is the mean of the replicas." in read_text(built)
    assert "Only the work of this run is shown: 2 rows are from an earlier one." in read_text(built)
    for timeline in (None, Timeline(), make_timeline(Span("read", 0.0, 1.0))):
        assert "Overlap" not in read_text(Report(title="T", summary=resumed, timeline=timeline))


def test_a_report_says_how_many_answers_keep_their_form() -> None:
    kept = {"keeps_form": True, "parsed": "{}"}
    rows = [make_row(0, **kept), make_row(1, **kept), make_row(2, keeps_form=False, parsed="[]")]
    rows += [make_row(3, keeps_form=False, parsed=None), make_row(4, error="x"), make_row(5)]
    summary = summarize(rows, metric=None, elapsed_s=1.0)
    assert (summary.num_formed, summary.num_keep_form, summary.num_parsed) == (4, 2, 3)
    assert "2 of 4 answers keep the form asked for; 3 parse as JSON" in report.format_table(summary)
    plain = summarize([make_row(0)], metric=None, elapsed_s=1.0)
    assert "form asked for" not in report.format_table(plain)
