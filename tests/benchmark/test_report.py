"""Breakdowns say who is better where, and fit where they are shown."""

from __future__ import annotations

import pytest

from vlmray.benchmark.report import breakdown_table, format_plan, plan_table
from vlmray.benchmark.samples import SampleFacts
from vlmray.benchmark.scoreboard import Scoreboard, score_models
from vlmray.benchmark.verdicts import sentence
from vlmray.config import BenchmarkConfig
from vlmray.reports.tables import Cell, Mark
from vlmray.reports.text import TERMINAL_WIDTH


def scoreboard(*others: str) -> Scoreboard:
    """A model that knows value_by_label alone, and others that know naming too."""
    samples = [
        SampleFacts(sample_id=f"{family}-{i}", question="?", answers=("4",), family=family, image=f"{i}")
        for i in range(40) for family in ("naming", "value_by_label")
    ]  # fmt: skip
    wrong = {"prediction": "5", "error": None}
    right = {"prediction": "4", "error": None}
    base = {s.sample_id: wrong if s.family == "naming" else right for s in samples}
    rows = {"base": base} | {name: dict.fromkeys(base, right) for name in others}
    return score_models(samples, rows, ["exact_match"], num_resamples=999)


def test_two_models_stand_side_by_side() -> None:
    table = breakdown_table(scoreboard("tuned"), "family")
    assert [column.label for column in table.columns] == [
        "family", "samples", "base", "tuned", "points", "p", "verdict",
    ]  # fmt: skip
    naming, other = table.rows
    assert isinstance(naming[3], Cell)
    assert (naming[0], naming[3].text, naming[4], naming[6]) == (
        "naming", "100.0 % (91.2–100.0)", "+100.0", Mark("right", "better"),
    )  # fmt: skip
    unchanged = Mark("unscored", "no significant change")
    assert (other[0], other[4:]) == ("value_by_label", ("0.0", "1.00", unchanged))


@pytest.mark.parametrize("others", [(), ("tuned",), ("one", "two")])
def test_every_model_is_compared_with_the_first_in_every_group(others: tuple[str, ...]) -> None:
    board = scoreboard(*others)
    for short in (False, True):
        table = breakdown_table(board, "family", short=short)
        assert len(table.rows) == 2 * max(1, len(others))
        assert all(len(row) == len(table.columns) for row in table.rows)
        for model in others if len(others) > 1 else ():
            assert sum(str(row[0]).endswith(f": {model}") for row in table.rows) == 2


def test_the_short_one_fits_a_terminal_and_has_the_interval() -> None:
    lines = breakdown_table(scoreboard("tuned"), "family", short=True).to_text().splitlines()
    assert max(map(len, lines)) <= TERMINAL_WIDTH
    assert lines[0].split() == ["family", "samples", "base", "tuned", "points", "95", "%", "interval", "p"]
    assert lines[2].split()[:9] == ["naming", "40", "0.0", "%", "100.0", "%", "+100.0", "+100.0", "to"]
    assert lines[3].split()[0] == "value_by_label"


def test_a_sentence_names_the_group_it_is_about() -> None:
    board = scoreboard("tuned")
    naming = board.difference("tuned", "exact_match", "family", "naming")
    assert sentence(naming).startswith("tuned is better than base on naming: +100.0 points of exact_match")
    other = board.difference("tuned", "exact_match", "family", "value_by_label")
    assert sentence(other).startswith("tuned against base on value_by_label: no significant change")
    assert sentence(board.difference("tuned", "exact_match")).startswith("tuned is better than base: +50.0")


@pytest.mark.parametrize(("num_images", "num_others"), [(4, 1), (5, 2), (7, 8)])
def test_few_images_are_said_to_show_nothing(num_images: int, num_others: int) -> None:
    samples = [
        SampleFacts(sample_id=f"{i}", question="?", answers=("4",), family=None, image=f"{i}")
        for i in range(num_images + 1)
    ]
    right, wrong = {"prediction": "4", "error": None}, {"prediction": "5", "error": None}

    def compare(size: int) -> str:
        names = [s.sample_id for s in samples[:size]]
        rows = {"base": dict.fromkeys(names, wrong)}
        rows |= {f"m{n}": dict.fromkeys(names, right if n == 0 else wrong) for n in range(num_others)}
        return sentence(score_models(samples[:size], rows, ["exact_match"]).difference("m0", "exact_match"))

    few = compare(num_images)
    assert few.startswith(
        f"m0 against base: too few images to show anything ({num_images + 1} are the fewest"
    )
    assert "no significant" not in few
    assert compare(num_images + 1).startswith("m0 is better than base: +100.0")


def test_a_plan_says_what_samples_show() -> None:
    pilot = scoreboard("one", "two")
    config = BenchmarkConfig(models="base=fake", plan="difference=10,samples=320,samples=20000", margin=5)
    table = plan_table(pilot, config)
    assert [row[:2] for row in table.rows] == [
        (f"{name}, base", what)
        for name in ("one", "two")
        for what in ("a difference", "a difference", "a difference", "not worse, if equal")
    ]
    text = format_plan(pilot, config)
    assert max(map(len, text.splitlines())) <= TERMINAL_WIDTH
    assert text.endswith("In 4 of 5 cases, if the samples are like these.")


def test_a_pilot_in_which_little_changed_is_said_to_be_poor() -> None:
    samples = [SampleFacts(sample_id=f"{i}", question="?", answers=("4",), image=f"{i}") for i in range(60)]

    def plan(num_changed: int) -> str:
        rows = {
            name: {
                sample.sample_id: {"prediction": "4" if i < 30 + gained else "5", "error": None}
                for i, sample in enumerate(samples)
            }
            for name, gained in (("base", 0), ("tuned", num_changed))
        }
        pilot = score_models(samples, rows, ["exact_match"], num_resamples=99)
        return format_plan(pilot, BenchmarkConfig(models="base=fake", plan="samples=320"))

    assert "Only 9 scores of tuned differ" in plan(9)
    assert "Only" not in plan(10)


@pytest.mark.parametrize("plan", ["2", "rows=3", "difference=0", "samples=1.5", "samples="])
def test_a_plan_that_is_none_is_refused(plan: str) -> None:
    with pytest.raises(ValueError, match=r"--plan (has|must be)"):
        BenchmarkConfig(models="base=fake", plan=plan)
