"""ChartQAPro's metric (arXiv 2504.05506), as lmms-eval computes it, quirks included.

Answers may be lists, written as Python writes them. Not covered: a list of which some places are years and
others are not; `vlmray.dataset.benchmarks` refuses such rows.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Callable
from itertools import zip_longest

from vlmray.metrics.similarity import anls

_TOLERANCE = 0.05
_BARE_WORD = re.compile(r"(?<![\w'])\w[^,]*?(?![\w'])")


def chartqapro_accuracy(prediction: str, answer: str) -> float:
    """Score numbers as 1.0 within 5 % of the answer, other texts by their edit similarity.

    A percent sign does not count, only zero equals zero, and of texts those that are less than half alike
    score 0. Of lists, it is the mean over places, where one that the other list lacks scores 0.

    >>> [chartqapro_accuracy(*pair) for pair in (("10.4%", "10"), ("Helo", "hello"), ("[7, 9]", "[7, 8, 9]"))]
    [1.0, 0.8, 0.3333333333333333]
    """
    return _mean_over_places(prediction, answer, _compare)


def chartqapro_exact(prediction: str, answer: str) -> float:
    """Score texts as 1.0 if they are equal, ignoring case; of lists, it is the mean over places.

    For years, and for questions of fact or with choices.

    >>> [chartqapro_exact(*pair) for pair in (("True.", "true"), ("2010", "2011"), ("[1, 7]", "[1, 8]"))]
    [1.0, 0.0, 0.5]
    """
    return _mean_over_places(
        prediction, answer, lambda found, expected: float(found.strip().lower() == expected.strip().lower())
    )


def split_answer(answer: str) -> list[str]:
    """Return the places of an answer that is a list, whose words may lack their quotes; else itself."""
    listed = re.fullmatch(r"\[(.*)\]", answer.strip())
    quoted = listed and _parse_list(f"[{_BARE_WORD.sub(_quote, listed[1])}]")
    return quoted or _parse_list(answer) or [answer]


def _quote(word: re.Match[str]) -> str:
    return f"'{word[0]}'"


def _parse_list(text: str) -> list[str] | None:
    with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        found = ast.literal_eval(text)
        if isinstance(found, list):
            return [str(item).strip(" '") for item in found]
    return None


def _mean_over_places(prediction: str, answer: str, compare: Callable[[str, str], float]) -> float:
    predicted, expected = (text.strip().strip(".").strip("\n") for text in (prediction, answer))
    places = list(zip_longest(_parse_list(predicted) or [predicted], split_answer(expected)))
    scores = [0.0 if found is None or wanted is None else compare(found, wanted) for found, wanted in places]
    return sum(scores) / len(scores)


def _compare(prediction: str, answer: str) -> float:
    found, expected = (text.strip().strip("%").strip() for text in (prediction, answer))
    with contextlib.suppress(ValueError):
        number, wanted = float(found), float(expected)
        return float(abs(number - wanted) / abs(wanted) <= _TOLERANCE if wanted else number == 0)
    return anls(found, expected)
