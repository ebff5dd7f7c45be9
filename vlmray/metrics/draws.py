"""Several answers to one question: what most of them say, and what the best of some is worth.

    texts  -> majority  -> the first answer that says what most do, and how many do
    scores -> pass_at_k -> expected score of the best of k

Shapes: `N` questions, `D` answers drawn to each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlmray.metrics.definitions import collapse, parse_number

_OPENING = "'\"([{<*_`“‘«¿¡"
_CLOSING = "'\")]}>*_`”’».,:;!?…。"
"""What may stand around an answer and is no part of it. Signs, % and a dot before digits are."""


def majority(texts: Sequence[str]) -> tuple[int, float]:
    """Find the answer that most of the draws give.

    Draws agree where `normal_form` makes them the same. Of answers that are given as often, that counts
    which was drawn first.

    Returns:
        Place of the first draw that gives it, and the share of draws that do.

    >>> majority(["12", "Blue", "blue.", "12.0", "blue"])
    (1, 0.6)

    Raises:
        ValueError: There are no draws.
    """
    groups: dict[str, list[int]] = {}
    for place, text in enumerate(texts):
        groups.setdefault(normal_form(text), []).append(place)
    largest = max(groups.values(), key=len)  # the first of those
    return largest[0], len(largest) / len(texts)


def normal_form(text: str) -> str:
    """Bring an answer to the form in which it is compared with others to the same question.

    Case, whitespace and punctuation around it do not count, nor how a number is written, nor the layout of
    JSON and the order of its fields.

    >>> [normal_form(text) for text in ("  New  York.", "1,000", "(1000.0)", "$5", '{"b": 1, "a": "X"}')]
    ['new york', '1000.0', '1000.0', '5.0', '{"a": "x", "b": 1.0}']
    """
    bare = text.strip().lstrip(_OPENING).rstrip(_CLOSING).strip()
    for candidate in (text, bare):
        if (number := parse_number(candidate)) is not None:
            return str(number + 0.0)  # no -0.0
    return collapse(_lay_out(text) or bare or text)


def _lay_out(text: str) -> str | None:
    """Write a JSON object or list as all of its value are; None: it is none."""
    try:
        value = json.loads(text, parse_int=float, parse_constant=str)
        is_whole = isinstance(value, dict | list)
        return json.dumps(value, ensure_ascii=False, sort_keys=True) if is_whole else None
    except (ValueError, RecursionError):
        return None


def pass_at_k(scores: ArrayLike, k: int) -> NDArray[np.float64]:
    """Return the expected score of the best of k of the D answers to a question, taken at random.

    Of scores that are 0 or 1 it is the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374): with c
    right ones 1 - C(D - c, k) / C(D, k). Of the C(D, k) ways to take k, the i-th lowest score is the best of
    C(i - 1, k - 1).

    >>> pass_at_k([[1, 0, 0, 0], [0.5, 0, 0.5, 1]], 2).tolist()
    [0.5, 0.75]

    Args:
        scores: (D,) or (N, D), 0 to 1.
        k: From 1 to D.

    Returns:
        () or (N,).

    Raises:
        ValueError: k is out of range.
    """
    ordered = np.sort(np.asarray(scores, np.float64), axis=-1)
    number = ordered.shape[-1]
    if not 1 <= k <= number:
        raise ValueError(f"the best of {k} of {number} draws; expected 1 to {number}")
    chances = [math.comb(place, k - 1) / math.comb(number, k) for place in range(number)]
    best = ordered[..., -1]
    # Counted from the best one, so that rounding moves no 0 and no 1.
    return np.asarray(best - (best[..., None] - ordered) @ np.array(chances))


def powers_to(number: int) -> list[int]:
    """Return the k that show how the best of k grows: 1, 2, 4, ... and the number of draws.

    >>> powers_to(1), powers_to(5), powers_to(8)
    ([1], [1, 2, 4, 5], [1, 2, 4, 8])
    """
    return [*(2**power for power in range(number.bit_length()) if 2**power < number), number]
