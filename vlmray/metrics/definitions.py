"""Metrics: pure functions of a prediction and its accepted answers, from 0 to 1.

    (prediction, answers) -> METRICS[name] -> Score

Each metric says where its definition comes from and how it deviates. Cases that fix its behaviour are
data: `tests/golden/*.json`. Predictions are scored as given; extracting an answer from a long text is
the prompt's business. Averages over samples are not covered. `evaluate.load(EVALUATE_PATH, name)` gives
any of them to code that takes metrics of the `evaluate` library.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

from vlmray.metrics.benchmarks import (
    ARTICLES,
    DIGITS,
    check_answers,
    gqa_accuracy,
    mmmu_choice,
    mmmu_open,
    mmstar_accuracy,
    ocrbench_accuracy,
    ocrbench_formula,
    vqav2_accuracy,
)
from vlmray.metrics.chartqapro import chartqapro_accuracy, chartqapro_exact
from vlmray.metrics.similarity import anls
from vlmray.schema import Score


class Metric(Protocol):
    """How well a prediction agrees with its accepted answers; some read it by the choices it had."""

    def __call__(self, prediction: str, answers: Sequence[str], choices: Sequence[str] = (), /) -> float:
        """Return a value from 0 to 1."""
        ...


EVALUATE_PATH = str(Path(__file__).parent / "vqa_metrics")
"""What `evaluate.load` takes, with the name of a metric; it needs no network."""

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?")
_CURRENCY = str.maketrans("−", "-", "$€£¥₹₩₽")
_CHOICE = re.compile(
    r"\s*(?:(?:the\s+)?(?:correct\s+)?(?:answer|option|choice)\b(?:\s+is\b)?\s*:?\s*)?"
    r"[(\[]?(?P<letter>[A-Z])(?:[).:\]]+\s*|\s*\n\s*|\s*$)(?P<text>.*)",
    re.IGNORECASE | re.DOTALL,
)


def score(metric_name: str, prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> Score:
    """Score a prediction against its accepted answers with the metric of that name.

    >>> score("relaxed_accuracy", "104", ["100"])
    Score(metric='relaxed_accuracy', value=1.0)

    Raises:
        ValueError: The metric is unknown, or there are no answers.
        TypeError: `answers` is a single string.
    """
    if metric_name not in METRICS:
        raise ValueError(f"unknown metric {metric_name!r}; known: {', '.join(METRICS)}")
    return Score(metric=metric_name, value=METRICS[metric_name](prediction, answers, choices))


def relaxed_accuracy(prediction: str, answer: str, *, tolerance: float = 0.05) -> float:
    """Score 1.0 if numbers agree within `tolerance` of the answer, or else strings agree ignoring case.

    Source: ChartQA (arXiv 2203.10244), section 5.1, as the pix2struct function that lmms-eval and
    VLMEvalKit use computes it. Its quirks are part of published numbers and kept: "2%" is not "2",
    "1,000" is not "1000", a trailing dot counts for text, an answer of 0 is compared as text, and
    years are numbers, so 2008 passes for 2010. Every number that Python parses is one: "1_000" is 1000,
    while "nan" and "inf" are numbers that agree with nothing, not even themselves.

    >>> [relaxed_accuracy(*pair) for pair in [("10.4", "10"), ("Blue", "blue"), ("2%", "2")]]
    [1.0, 1.0, 0.0]
    """
    predicted, expected = _parse_official(prediction), _parse_official(answer)
    if predicted is not None and expected:  # Zero takes the other branch, as the source has it.
        return float(abs(predicted - expected) / abs(expected) <= tolerance)
    return float(prediction.lower() == answer.lower())


def relaxed_accuracy_normalized(prediction: str, answer: str, *, tolerance: float = 0.05) -> float:
    """Score as `relaxed_accuracy` does, but read numbers and text as a person would.

    Not a published metric: report it beside the official one, never in its place. It never scores
    lower. On both sides it ignores outer whitespace, trailing dots, currency signs, well-placed
    thousands commas and a percent sign ("2%" equals "2", and still equals "0.02"); zero is a number
    that only zero equals; other text is compared ignoring case and repeated whitespace.

    >>> pairs = [("2%", "2"), ("$1,000.", "1000"), ("0.0", "0"), ("Yes.", "yes"), ("0.01", "0")]
    >>> [relaxed_accuracy_normalized(*pair) for pair in pairs]
    [1.0, 1.0, 1.0, 1.0, 0.0]
    """
    if relaxed_accuracy(prediction, answer, tolerance=tolerance):
        return 1.0
    predicted, expected = parse_number(prediction), parse_number(answer)
    if predicted is not None and expected is not None:
        return float(abs(predicted - expected) <= tolerance * abs(expected))
    return exact_match(_strip_dots(prediction), _strip_dots(answer))


def exact_match(prediction: str, answer: str) -> float:
    """Score 1.0 if the texts are equal, ignoring case, outer whitespace and how much is between words.

    Punctuation counts: a trailing dot is a difference.

    >>> exact_match("  New   York ", "new york"), exact_match("Yes.", "yes")
    (1.0, 0.0)
    """
    return float(collapse(prediction) == collapse(answer))


def token_f1(prediction: str, answer: str) -> float:
    """Score the harmonic mean of token precision and recall.

    Source: SQuAD (arXiv 1606.05250), with its normalisation: lower case, no ASCII punctuation, no
    articles. Two texts without tokens agree, as in SQuAD 2.0.

    >>> token_f1("The red bar.", "red"), token_f1("a", "the")
    (0.6666666666666666, 1.0)
    """
    predicted, expected = _squad_tokens(prediction), _squad_tokens(answer)
    if not predicted or not expected:
        return float(predicted == expected)
    num_common = (Counter(predicted) & Counter(expected)).total()
    return 2 * num_common / (len(predicted) + len(expected))


def rouge(prediction: str, answer: str) -> float:
    """Score ROUGE-L: the F1 of the longest common subsequence of words, without stemming.

    Source: the package rouge-score, as `evaluate` and TRL's examples use it. On answers of one word it is
    0 or 1: good for sentences, not for ranking models on ChartQA. Words are runs of a-z and 0-9; a text
    without any scores 0, even against itself.

    >>> round(rouge("the tall red bar", "the red bar"), 3)
    0.857
    """
    return float(_rouge_scorer().score(answer, prediction)["rougeL"].fmeasure)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Score min(1, matches / 3), averaged over leaving out one human answer at a time.

    Source: VQA (arXiv 1505.00468), used for VQAv2 and TextVQA with ten answers each: 1, 2, 3 or more
    matches give 0.3, 0.6, 0.9 and 1. Where fewer than four answers exist, all the others must match
    instead of three of them, and a single answer is compared directly.

    Deviation: texts are normalised the same way always (lower case, no punctuation except the decimal
    point, no articles, number words up to ten as digits). The official script turns punctuation into a
    space or nothing depending on its neighbours, repairs contractions from a table (here the apostrophe
    goes on both sides), and leaves answers alone where all ten agree.

    >>> [round(vqa_accuracy("two", ["2"] * n + ["3"] * (10 - n)), 6) for n in range(5)]
    [0.0, 0.3, 0.6, 0.9, 1.0]
    """
    check_answers(answers)
    predicted = _vqa_normalize(prediction)
    num_answers = len(answers)
    num_matches = sum(_vqa_normalize(answer) == predicted for answer in answers)
    if num_answers == 1:
        return float(num_matches)
    needed = min(3, num_answers - 1)
    # Leaving out one of the matching answers loses a match; leaving out another loses none.
    without_match = num_matches * min(1.0, (num_matches - 1) / needed)
    without_other = (num_answers - num_matches) * min(1.0, num_matches / needed)
    return (without_match + without_other) / num_answers


def choice_accuracy(prediction: str, answer: str) -> float:
    """Score 1.0 if a prediction picks the answer of a multiple-choice question, by letter or by text.

    A letter is read from "B", "b.", "(B)", "B) blue", "Answer: B" or "The answer is B"; "A bar" has none,
    as its A is an article. Where both sides have a letter the letters decide, otherwise the option texts
    without it, as in `exact_match`. A dataset that accepts both gives both as answers.

    >>> [choice_accuracy(text, "B") for text in ("B", "(b)", "B) blue", "The answer is B.", "A", "Bar")]
    [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    >>> choice_accuracy("B) blue", "Blue")
    1.0
    """
    predicted, expected = _CHOICE.fullmatch(prediction), _CHOICE.fullmatch(answer)
    if predicted and expected:
        return float(predicted["letter"].upper() == expected["letter"].upper())
    predicted_text = (predicted and predicted["text"]) or prediction
    expected_text = (expected and expected["text"]) or answer
    return exact_match(_strip_dots(predicted_text), _strip_dots(expected_text))


def field_accuracy(prediction: str, answer: str) -> float:
    """Score the share of right fields of an answer that is JSON, each by a rule of its own.

    Numbers agree within 5 % of the answer's, other values as in `exact_match`. A field `$rules` of the answer
    says otherwise of fields by their names: "exact" (the same value, types and all), "anls", or a tolerance
    of numbers as a share, "0.01". Of objects and lists each member counts alike, as deep as they go; one
    that only the prediction has is wrong. A prediction that is no JSON has no right field; an answer that is
    none is one field.

    Not a published metric.

    >>> field_accuracy('{"name": "ACME", "total": 102, "paid": true}', '{"name": "Acme", "total": 100}')
    0.6666666666666666
    >>> field_accuracy('{"total": 102}', '{"total": 100, "$rules": {"total": "0.01"}}')
    0.0
    """
    expected = _parse_json(answer)
    predicted = _parse_json(prediction)
    if isinstance(expected, dict | list) and isinstance(predicted, str):
        return 0.0
    scores = list(_score_fields(predicted, expected, ""))
    return math.fsum(scores) / len(scores) if scores else 1.0


def _score_fields(predicted: Any, expected: Any, rule: str) -> Iterator[float]:
    if isinstance(expected, list):
        members = predicted if isinstance(predicted, list) else []
        pairs = zip_longest(members, expected, fillvalue=_MISSING)
        yield from (score for pair in pairs for score in _score_fields(*pair, rule))
    elif isinstance(expected, dict):
        rules = expected.get("$rules", {})
        if not isinstance(rules, dict):
            raise ValueError(f"$rules is no object but {rules!r}")
        found = predicted if isinstance(predicted, dict) else {}
        for name in dict.fromkeys([*expected, *found]):
            if name != "$rules":
                pair = found.get(name, _MISSING), expected.get(name, _MISSING)
                yield from _score_fields(*pair, rules.get(name, rule))
    else:
        yield _score_field(predicted, expected, rule)


def _score_field(predicted: Any, expected: Any, rule: str) -> float:
    if predicted is _MISSING or expected is _MISSING or isinstance(predicted, dict | list):
        return 0.0
    if rule == "exact":
        return float(type(predicted) is type(expected) and predicted == expected)
    numbers = [value for value in (predicted, expected) if type(value) in (int, float)]
    if len(numbers) == 2 and rule != "anls":
        return float(abs(predicted - expected) <= _tolerance(rule) * abs(expected))
    texts = [value if isinstance(value, str) else json.dumps(value) for value in (predicted, expected)]
    return anls(*texts) if rule == "anls" else exact_match(*texts)


def _tolerance(rule: str) -> float:
    try:
        return float(rule or 0.05)
    except (TypeError, ValueError):
        raise ValueError(
            f'the rule {rule!r} is neither "exact" nor "anls" nor a tolerance like "0.01"'
        ) from None


_MISSING = object()


def _parse_json(text: str) -> Any:
    """Return a JSON value; a text that is none is itself."""
    try:
        return json.loads(text, parse_constant=str)
    except (ValueError, RecursionError):
        return text


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    logging.getLogger("absl").setLevel(logging.WARNING)  # it announces its tokenizer
    return RougeScorer(["rougeL"])


def _best_of(metric: Callable[[str, str], float]) -> Metric:
    """Make a metric of one answer a metric of several: the best one counts."""

    def best(prediction: str, answers: Sequence[str]) -> float:
        check_answers(answers)
        return max(metric(prediction, answer) for answer in answers)

    return _of_all(functools.update_wrapper(best, metric, ("__name__", "__doc__")))


def _of_all(metric: Callable[[str, Sequence[str]], float]) -> Metric:
    """Make a metric of all answers together one that is told the choices, and needs none."""

    @functools.wraps(metric, ("__name__", "__doc__"))
    def of_all(prediction: str, answers: Sequence[str], choices: Sequence[str] = (), /) -> float:
        return metric(prediction, answers)

    return of_all


def _parse_official(text: str) -> float | None:
    """Parse a number as the pix2struct function does: all trailing % go and divide by 100 once."""
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def parse_number(text: str) -> float | None:
    """Parse a number with signs and separators a person would overlook; None if it is not one."""
    text = _strip_dots(text.translate(_CURRENCY)).removesuffix("%").strip()
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    number = float(text) if _NUMBER.fullmatch(text) else math.inf
    return number if math.isfinite(number) else None


def _strip_dots(text: str) -> str:
    return text.strip().rstrip(".").rstrip()


def collapse(text: str) -> str:
    """Bring a text to one case, with one space between words."""
    return " ".join(text.casefold().split())


def _squad_tokens(text: str) -> list[str]:
    return [token for token in text.lower().translate(_NO_PUNCTUATION).split() if token not in ARTICLES]


def _vqa_normalize(text: str) -> str:
    """Bring an answer to the form in which people's answers are compared."""
    text = text.lower().replace("'", "").replace("’", "")
    text = re.sub(r"(?<=\d),(?=\d)", "", text)  # 1,000
    text = re.sub(r"(?!(?<=\d)\.(?=\d))[^\w\s%$€£]|_", " ", text)  # Any punctuation, 3.5 excepted.
    words = (DIGITS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in ARTICLES)


METRICS: dict[str, Metric] = {
    "relaxed_accuracy": _best_of(relaxed_accuracy),
    "relaxed_accuracy_normalized": _best_of(relaxed_accuracy_normalized),
    "exact_match": _best_of(exact_match),
    "anls": _best_of(anls),
    "token_f1": _best_of(token_f1),
    "rouge": _best_of(rouge),
    "vqa_accuracy": _of_all(vqa_accuracy),
    "choice_accuracy": _best_of(choice_accuracy),
    "vqav2_accuracy": _of_all(vqav2_accuracy),
    "gqa_accuracy": _best_of(gqa_accuracy),
    "chartqapro_accuracy": _best_of(chartqapro_accuracy),
    "chartqapro_exact": _best_of(chartqapro_exact),
    "field_accuracy": _best_of(field_accuracy),
    "mmstar_accuracy": _best_of(mmstar_accuracy),
    "ocrbench_accuracy": _best_of(ocrbench_accuracy),
    "ocrbench_formula": _best_of(ocrbench_formula),
    "mmmu_choice": mmmu_choice,
    "mmmu_open": _best_of(mmmu_open),
}
"""Every metric by name, from a prediction and its accepted answers to a value from 0 to 1."""
