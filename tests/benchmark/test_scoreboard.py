"""The scoreboard: what counts, what is compared with what, and what is said of it."""

from __future__ import annotations

import dataclasses
from itertools import chain, pairwise
from typing import Any

import pytest

from vlmray.benchmark.samples import SampleFacts
from vlmray.benchmark.scoreboard import score_answer, score_models
from vlmray.benchmark.slices.groups import answer_type, break_down
from vlmray.benchmark.verdicts import margin_sentence


def sample(index: int, **facts: Any) -> SampleFacts:
    facts = {
        "answers": ("4",),
        "family": "count",
        "image": f"chart-{index // 2}",
        "num_pixels": 30_000,
    } | facts
    return SampleFacts(sample_id=f"test-{index:06}", question="How many?", **facts)


def answers(samples: list[SampleFacts], *predictions: str | None) -> dict[str, dict[str, Any]]:
    return {
        each.sample_id: {"prediction": text, "error": None if text is not None else "broken"}
        for each, text in zip(samples, predictions, strict=True)
    }


def test_scores_are_means_and_failures_are_wrong() -> None:
    samples = [sample(0), sample(1), sample(2), sample(3)]
    board = score_models(samples, {"base": answers(samples, "4", "5", None, "4")}, ["exact_match"])
    found = board.score("base", "exact_match")
    assert (found.mean, found.num_samples, found.num_images) == (0.5, 4, 2)
    assert board.differences == ()


def test_rows_are_compared_by_their_ids() -> None:
    samples = [sample(0), sample(1), sample(2), sample(3, family="list"), sample(4, family="list")]
    base = answers(samples, "5", "4", "5", "4", None)
    tuned = dict(reversed(answers(samples, "4", "4", "4", "5", "4").items()))
    board = score_models(samples, {"base": base, "tuned": tuned}, ["exact_match"])
    count = board.difference("tuned", "exact_match", "family", "count").difference
    listed = board.difference("tuned", "exact_match", "family", "list").difference
    assert (count.num_samples, count.num_gained, count.num_lost) == (3, 2, 0)
    assert board.score("base", "exact_match", "family", "count").mean == pytest.approx(1 / 3)
    assert board.score("tuned", "exact_match", "family", "count").mean == 1.0
    assert (listed.mean, listed.num_gained, listed.num_lost) == (0.0, 1, 1)
    total = board.difference("tuned", "exact_match").difference
    assert (total.num_samples, total.mean) == (5, pytest.approx(0.4))


def test_every_answer_keeps_its_score() -> None:
    samples = [sample(0), sample(1, answers=()), sample(2), sample(3)]
    rows = {"base": answers(samples, "4", "4", None, "5"), "tuned": answers(samples, "5", "4", "4", "4")}
    board = score_models(samples, rows, ["exact_match", "anls", "bleu"])
    assert board.answers.keys() == {(model, metric) for model in rows for metric in ("exact_match", "anls")}
    for (model, metric), found in board.answers.items():
        assert found == {
            each.sample_id: score_answer(metric, rows[model][each.sample_id], each)
            for each in samples if each.answers
        }  # fmt: skip
    assert list(board.answers["tuned", "exact_match"].values()) == [0.0, 1.0, 1.0]


def test_failing_does_not_make_a_model_better() -> None:
    samples = [sample(0), sample(1), sample(2, family="list")]
    base, failed = answers(samples, "4", "5", "4"), answers(samples, None, None, None)
    board = score_models(samples, {"base": base, "failed": failed}, ["exact_match"])
    assert board.score("failed", "exact_match").mean == 0
    assert board.difference("failed", "exact_match").difference.num_gained == 0


def test_answers_to_other_samples_are_refused() -> None:
    samples = [sample(0), sample(1)]
    whole, part = answers(samples, "4", "4"), answers(samples[1:], "4")
    for rows in ({"base": whole, "tuned": part}, {"base": part, "tuned": whole}):
        with pytest.raises(ValueError, match=r"has no row of test-000000; compare answers to the same"):
            score_models(samples, rows, ["exact_match"])


def test_rows_without_answers_count_nowhere() -> None:
    samples = [sample(0), sample(1, answers=())]
    board = score_models(samples, {"base": answers(samples, "4", "4")}, ["exact_match"])
    assert (board.num_samples, board.score("base", "exact_match").mean) == (1, 1.0)
    with pytest.raises(ValueError, match="no sample has an answer"):
        score_models([samples[1]], {"base": answers([samples[1]], "4")}, ["exact_match"])


def test_a_change_in_one_family_is_found_there_and_not_elsewhere() -> None:
    samples = [sample(index, family="count" if index % 2 else "naming") for index in range(80)]
    base = answers(samples, *["4" if index % 2 else "5" for index in range(80)])
    tuned = answers(samples, *["4"] * 80)
    board = score_models(samples, {"base": base, "tuned": tuned}, ["exact_match", "anls"])
    naming = board.difference("tuned", "exact_match", "family", "naming")
    assert naming.verdict == "better"
    assert (naming.difference.mean, naming.difference.num_gained) == (1.0, 40)
    assert board.difference("tuned", "exact_match", "family", "count").verdict == "no significant change"
    assert board.difference("tuned", "exact_match").difference.mean == 0.5
    assert board.score("tuned", "exact_match", "family", "naming").mean == 1.0
    assert {score.metric for score in board.scores if score.kind != "all"} == {"exact_match"}
    worse = score_models(samples, {"tuned": tuned, "base": base}, ["exact_match"])
    assert worse.difference("base", "exact_match").verdict == "worse"


def test_asking_of_more_models_asks_for_more_evidence() -> None:
    samples = [sample(index, image=None) for index in range(40)]
    base = answers(samples, *["5"] * 40)
    slightly = answers(samples, *["4" if index < 6 else "5" for index in range(40)])
    alone = score_models(samples, {"base": base, "one": slightly}, ["exact_match"])
    many = {"base": base, "one": slightly, "two": base, "three": base, "four": base}
    beside = score_models(samples, many, ["exact_match"])
    assert alone.difference("one", "exact_match").verdict == "better"
    assert beside.difference("one", "exact_match").verdict == "no significant change"
    assert beside.difference("one", "exact_match").p_corrected == pytest.approx(
        4 * alone.difference("one", "exact_match").p_corrected, rel=0.2
    )


def test_breakdowns_are_there_where_they_tell_samples_apart() -> None:
    samples = [sample(0), sample(1)]
    assert score_models(samples, {"a": answers(samples, "4", "4")}, ["exact_match"]).kinds == []
    samples = [sample(0), sample(1, answers=("yes",), family="human", num_pixels=2_000_000)]
    board = score_models(samples, {"a": answers(samples, "4", "no")}, ["exact_match"])
    assert board.kinds == ["family", "answer", "image size"]
    assert board.groups("answer") == ["number", "yes or no"]
    assert board.groups("image size") == ["up to 30,000 pixels", "30,001 to 2,000,000 pixels"]
    without = [dataclasses.replace(each, num_pixels=None) for each in samples]
    assert (
        "image size" not in score_models(without, {"a": answers(samples, "4", "no")}, ["exact_match"]).kinds
    )


@pytest.mark.parametrize(
    "lengths", [[4], [4, 4, 9], [1, 2, 3, 4, 5, 6, 7], [5, 5, 5, 5, 1, 9], [*range(100)]]
)
def test_thirds_hold_every_sample_once_and_those_alike_together(lengths: list[int]) -> None:
    samples = [dataclasses.replace(sample(i), question="x" * length) for i, length in enumerate(lengths)]
    groups = break_down(samples).get("question", {})
    assert bool(groups) == (len({*lengths}) > 1)
    if groups:
        assert sorted(chain(*groups.values())) == list(range(len(lengths)))
        kept = [{lengths[place] for place in places} for places in groups.values()]
        assert all(max(one) < min(other) for one, other in pairwise(kept))
        assert len(groups) <= 3


def test_bleu_is_of_the_corpus_and_signed() -> None:
    samples = [sample(0, answers=("the red bar is tall",)), sample(1, answers=("blue",))]
    board = score_models(
        samples, {"a": answers(samples, "the red bar is tall", "blue")}, ["exact_match", "bleu"]
    )
    score, signature = board.bleu["a"]
    assert score == pytest.approx(1.0)
    assert "version" in signature
    assert board.metrics == ("exact_match",)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [("Yes", "yes or no"), ("12", "number"), ("-3.5%", "number"), ("$1,000", "number"), ("2019 Q1", "words"),
     ("Blue", "words")],
)  # fmt: skip
def test_answer_types(answer: str, kind: str) -> None:
    assert answer_type([answer, "no"]) == kind


def compare_with_margin(num_samples: int, num_lost: int, *others: int) -> list[str]:
    """Return what is said of models that lose so many of the answers, with a margin of 5 points."""
    samples = [sample(index, image=f"chart-{index}") for index in range(num_samples)]
    rows = {"base": answers(samples, *["4"] * num_samples)}
    for number, lost in enumerate((num_lost, *others)):
        rows[f"m{number}"] = answers(samples, *["5"] * lost, *["4"] * (num_samples - lost))
    board = score_models(samples, rows, ["exact_match"], margin=0.05, num_resamples=999)
    found = [board.difference(model, "exact_match") for model in board.models[1:]]
    return list(map(margin_sentence, board.margins, found))


def test_a_model_that_loses_little_is_not_worse_by_more_than_the_margin() -> None:
    (said,) = compare_with_margin(400, 4)
    assert said.startswith(
        "m0 is not worse than base by more than 5 points of exact_match: one-sided 95 % bound"
    )


def test_few_samples_do_not_show_it_and_what_would_is_said() -> None:
    (said,) = compare_with_margin(40, 1)
    assert said.startswith("m0 is not shown to be no worse than base by more than 5 points of exact_match")
    assert "such samples would show it in 4 of 5 cases" in said


def test_a_model_that_is_worse_is_promised_nothing() -> None:
    (said,) = compare_with_margin(100, 30)
    assert "is not shown" in said
    assert "would show" not in said


def test_several_models_have_to_show_more() -> None:
    samples = [sample(index, image=f"chart-{index}") for index in range(200)]
    rows = {"base": answers(samples, *["4"] * 200)}
    rows |= {f"m{n}": answers(samples, *["5"] * 4, *["4"] * 196) for n in range(3)}
    board = score_models(samples, rows, ["exact_match"], margin=0.04, num_resamples=999)
    assert all(found.p_corrected == pytest.approx(3 * found.test.p_value) for found in board.margins)


def test_without_a_margin_none_is_looked_at() -> None:
    samples = [sample(0), sample(1)]
    both = {name: answers(samples, "4", "5") for name in ("base", "tuned")}
    assert score_models(samples, both, ["exact_match"]).margins == ()
