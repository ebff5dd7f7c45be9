"""Metrics: the golden cases of `tests/golden`, and what holds for any prediction and answers."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from helpers.paths import GOLDEN
from vlmray import metrics
from vlmray.metrics import METRICS, score
from vlmray.schema import Score

RELAXED_CASES = json.loads((GOLDEN / "relaxed_accuracy.json").read_text(encoding="utf-8"))
METRIC_CASES = json.loads((GOLDEN / "metrics.json").read_text(encoding="utf-8"))
AVERAGED = {"vqa_accuracy", "vqav2_accuracy"}
PAIRWISE = sorted(METRICS.keys() - AVERAGED)


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
        if name == "rouge" and not re.search("[a-z0-9]", text.lower()):
            continue  # no word in it, as ROUGE counts them
        if name in ("mmstar_accuracy", "mmmu_choice") and not re.fullmatch("[A-Z]", text.strip()):
            continue  # no letter of a choice
        if name in ("vqav2_accuracy", "mmmu_open"):
            continue  # one wants three other answers, one cuts texts up: see their golden cases
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


def test_every_metric_is_told_the_choices_and_one_reads_them() -> None:
    asked = "a very large red bar there", ["A"]
    told = {name for name in METRICS if score(name, *asked, ["red", "blue"]) != score(name, *asked)}
    assert told == {"mmmu_choice"}


def test_unknown_metric_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"unknown metric 'rogue'; known: relaxed_accuracy, .*choice_accuracy"
    ):
        score("rogue", "a", ["a"])


@pytest.mark.parametrize("name", METRICS)
def test_answers_must_be_a_sequence_with_something_in_it(name: str) -> None:
    with pytest.raises(ValueError, match="no answers"):
        METRICS[name]("a", [])
    with pytest.raises(TypeError, match="got the string 'abc'"):
        METRICS[name]("a", "abc")


def _adversarial_text(rng: random.Random) -> str:
    """Draw texts on which implementations of these metrics are known to part."""
    number = rng.choice([0, 1, 2, 5, 10, 12.5, 95, 100, 105, 0.05, 1e3, -4, 2008, 2010])
    number *= rng.choice([1, 1, 1, 1.05, 0.95, 1.0500001, -1])
    return rng.choice(
        [
            f"{number:g}", f"{number:g}%", f"{number}%%", f"{number:,}", f" {number:g} ", f"{number:g}.",
            "nan", "inf", "-inf", "1_000", "", " ", "Yes", "no", "No.", "é", "İ", "ß", "the  bar", "The bar",
            "bar",
            "٣", "1e400", "%", "+5", "5 %", "\t5\n", "0", "0.0", "-0", "New\u00a0York", "new york",
        ]
    )  # fmt: skip


def _reference_relaxed(target: str, prediction: str) -> bool:
    """Relaxed correctness, written from the definition: 5 % of a non-zero target."""

    def number(text: str) -> float | None:
        try:
            return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
        except ValueError:
            return None

    p, t = number(prediction), number(target)
    return abs(p - t) / abs(t) <= 0.05 if p is not None and t else prediction.lower() == target.lower()


def _reference_anls(prediction: str, target: str) -> float:
    """ANLS of DocVQA, by the full table of edit distances."""
    a, b = (" ".join(text.strip().lower().split()) for text in (target, prediction))
    table = [[max(i, j) if 0 in (i, j) else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            table[i][j] = min(
                table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
            )
    length = max(len(target), len(prediction))
    distance = 0.0 if length == 0 else table[-1][-1] / length
    return 1 - distance if 1 - distance >= 0.5 else 0.0


def test_10000_pairs_agree_with_definitions_written_anew() -> None:
    """Relaxed accuracy, ANLS and exact match against functions written here from the definitions alone."""
    rng = random.Random(5)
    for _ in range(10_000):
        draw = rng.choice([_random_text, _adversarial_text])
        prediction, answers = draw(rng), [draw(rng) for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.2:
            prediction = rng.choice(answers).swapcase()
        pair = (prediction, answers)
        assert score("relaxed_accuracy", *pair).value == any(
            _reference_relaxed(answer, prediction) for answer in answers
        ), pair
        expected = max(_reference_anls(prediction, answer) for answer in answers)
        assert score("anls", *pair).value == pytest.approx(expected, abs=1e-12), pair
        normal = {" ".join(answer.casefold().split()) for answer in answers}
        assert score("exact_match", *pair).value == (" ".join(prediction.casefold().split()) in normal), pair


def test_rouge_and_bleu_are_those_of_their_packages() -> None:
    assert metrics.rouge("the tall red bar", "the red bar") == pytest.approx(6 / 7)
    same = (["the red bar is the tallest"], [["the red bar is the tallest"]])
    assert metrics.corpus_bleu(*same)[0] == pytest.approx(1.0)
    several, signature = metrics.corpus_bleu(["a b c d", "x"], [["a b c d", "b"], ["y"]])
    assert 0 < several < 1
    assert signature.startswith("nrefs:var")
    with pytest.raises(ValueError, match="0 predictions"):
        metrics.corpus_bleu([], [])


def test_evaluate_loads_every_metric_without_a_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    evaluate = pytest.importorskip("evaluate")
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    predictions, references = ["4", "the red bar"], [["4", "four"], ["a red bar"]]
    for name in METRICS:
        module = evaluate.load(metrics.EVALUATE_PATH, name)
        mean = sum(METRICS[name](*pair) for pair in zip(predictions, references, strict=True)) / 2
        assert module.compute(predictions=predictions, references=references) == {name: pytest.approx(mean)}
    bleu = evaluate.load(metrics.EVALUATE_PATH, "bleu")
    assert bleu.compute(predictions=predictions, references=references)["signature"]
    names = ["relaxed_accuracy", "anls", "rouge"]
    combined = evaluate.combine([evaluate.load(metrics.EVALUATE_PATH, name) for name in names])
    assert set(combined.compute(predictions=predictions, references=["4", "a red bar"])) == set(names)
    with pytest.raises(ValueError, match="unknown metric"):
        evaluate.load(metrics.EVALUATE_PATH, "acuracy")
