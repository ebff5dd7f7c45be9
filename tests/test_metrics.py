"""Metrics: the golden cases of `tests/golden`, and what holds for any prediction and answers."""

from __future__ import annotations

import doctest
import json
import random
from pathlib import Path
from typing import Any

import pytest

from vlmray import metrics
from vlmray.metrics import METRICS, score
from vlmray.schema import Score

GOLDEN = Path(__file__).parent / "golden"
RELAXED_CASES = json.loads((GOLDEN / "relaxed_accuracy.json").read_text(encoding="utf-8"))
METRIC_CASES = json.loads((GOLDEN / "metrics.json").read_text(encoding="utf-8"))
PAIRWISE = sorted(METRICS.keys() - {"vqa_accuracy"})


def _random_text(rng: random.Random) -> str:
    """Draw a text of the pieces that metrics treat specially, often equal or close to another draw."""
    pieces = [
        "1",
        "2",
        "0",
        "10",
        "1,000",
        ".",
        "%",
        "$",
        " ",
        "-",
        "A",
        "b",
        ")",
        "the",
        "two",
        "ba",
        "é",
        "",
    ]
    return "".join(rng.choices(pieces, k=rng.randint(0, 4)))


def _random_pairs(num_pairs: int = 400) -> list[tuple[str, list[str]]]:
    rng = random.Random(0)
    return [
        (_random_text(rng), [_random_text(rng) for _ in range(rng.randint(1, 5))]) for _ in range(num_pairs)
    ]


@pytest.mark.parametrize("case", RELAXED_CASES, ids=lambda case: f"{case['prediction']}|{case['answer']}")
def test_relaxed_accuracy_golden(case: dict[str, Any]) -> None:
    pair = case["prediction"], case["answer"]
    assert metrics.relaxed_accuracy(*pair) == case["official"], case["why"]
    assert metrics.relaxed_accuracy_normalized(*pair) == case["normalized"], case["why"]


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, cases in METRIC_CASES.items() for case in cases]
)
def test_metrics_golden(name: str, case: dict[str, Any]) -> None:
    assert METRICS[name](case["prediction"], case["answers"]) == pytest.approx(case["value"], abs=1e-6), case[
        "why"
    ]


def test_every_metric_has_golden_cases() -> None:
    assert METRIC_CASES.keys() == METRICS.keys()


def test_doctests() -> None:
    result = doctest.testmod(metrics)
    assert result.attempted > 5
    assert result.failed == 0


@pytest.mark.parametrize("name", METRICS)
def test_values_lie_between_0_and_1(name: str) -> None:
    for prediction, answers in _random_pairs():
        value = METRICS[name](prediction, answers)
        assert isinstance(value, float)
        assert 0.0 <= value <= 1.0, (prediction, answers)


@pytest.mark.parametrize("name", PAIRWISE)
def test_another_answer_never_lowers_the_score(name: str) -> None:
    for prediction, answers in _random_pairs():
        values = [METRICS[name](prediction, answers[: i + 1]) for i in range(len(answers))]
        assert values == sorted(values), (prediction, answers)


@pytest.mark.parametrize("name", METRICS)
def test_the_order_of_answers_does_not_matter(name: str) -> None:
    for prediction, answers in _random_pairs(100):
        assert METRICS[name](prediction, answers) == METRICS[name](prediction, answers[::-1])


@pytest.mark.parametrize("name", METRICS)
def test_the_answer_itself_is_right(name: str) -> None:
    for text, _ in _random_pairs():
        assert METRICS[name](text, [text]) == 1.0, text


def test_normalized_is_never_below_official() -> None:
    for prediction, answers in _random_pairs():
        official = METRICS["relaxed_accuracy"](prediction, answers)
        assert METRICS["relaxed_accuracy_normalized"](prediction, answers) >= official, (prediction, answers)


def test_vqa_accuracy_is_the_mean_over_left_out_answers() -> None:
    for prediction, answers in _random_pairs():
        answers = (answers * 10)[:10]
        matches = [bool(metrics.vqa_accuracy(prediction, [answer])) for answer in answers]
        left_out = [min(1.0, sum(matches[:i] + matches[i + 1 :]) / 3) for i in range(10)]
        assert metrics.vqa_accuracy(prediction, answers) == pytest.approx(sum(left_out) / 10)


def test_anls_is_symmetric_and_exact_without_whitespace() -> None:
    for prediction, answers in _random_pairs():
        left, right = prediction.replace(" ", ""), answers[0].replace(" ", "")
        assert metrics.anls(left, right) == metrics.anls(right, left)
        # Without its threshold the metric is never clipped, so a shortcut would show.
        raw = metrics.anls(left, right, threshold=0.0)
        assert metrics.anls(left, right) == (raw if raw >= 0.5 else 0.0)


def test_anls_is_quick_for_runaway_predictions() -> None:
    assert metrics.anls("word " * 100_000, "hello") == 0.0


def test_score_names_its_metric() -> None:
    assert score("exact_match", "a", ["A"]) == Score(metric="exact_match", value=1.0)


def test_unknown_metric_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"unknown metric 'rouge'; known: relaxed_accuracy, .*choice_accuracy"
    ):
        score("rouge", "a", ["a"])


@pytest.mark.parametrize("name", METRICS)
def test_answers_must_be_a_sequence_with_something_in_it(name: str) -> None:
    with pytest.raises(ValueError, match="no answers"):
        METRICS[name]("a", [])
    with pytest.raises(TypeError, match="got the string 'abc'"):
        METRICS[name]("a", "abc")
