"""A run in numbers: scores by family, failures, rates, and which answers to show.

Result rows are mappings with the keys `sample_id`, `family`, `score` (None where there is nothing to compare
with), `error` (None where the row was answered), `num_prompt_tokens` and `num_completion_tokens`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from vlmray.reports.errors import NO_FAMILY, is_failed
from vlmray.reports.gallery import Verdict, verdict_of
from vlmray.reports.text import read_number
from vlmray.schema import Row


def _family_of(row: Row) -> str:
    return row.get("family") or NO_FAMILY


def _sorted_families(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (name == NO_FAMILY, name))


# ---------------------------------------------------------------------------------------------
# Summary: the arithmetic
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySummary:
    """Counts and score of one family of questions."""

    name: str
    num_rows: int
    num_answered: int
    num_failed: int
    num_scored: int
    score: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One run in numbers; `num_rows` is always `num_answered` + `num_failed`."""

    num_rows: int
    num_answered: int
    num_failed: int

    num_resumed: int
    """How many of the rows were taken over from an earlier run."""

    num_scored: int
    """Answered rows that have answers to compare with."""

    metric: str | None
    """Name of the metric; None where there are no answers to compare with."""

    score: float | None
    """Mean over the scored rows, 0 to 1; None where there are none."""

    score_with_failures: float | None
    """The same mean with each failed row that has answers counted as wrong."""

    families: tuple[FamilySummary, ...]
    """By name, rows without a family last; empty where no row has one."""

    elapsed_s: float
    """Wall-clock time of this run, model loading included."""

    samples_per_s: float | None
    """Rows answered in this run over `elapsed_s`; None where this run answered none."""

    tokens_per_s: float | None
    """Tokens written in this run over `elapsed_s`; prompts are not counted."""

    num_prompt_tokens: int
    num_completion_tokens: int


def summarize(
    rows: Iterable[Row], *, metric: str | None, elapsed_s: float, resumed_ids: Collection[str] = ()
) -> Summary:
    """Count rows, mean their scores and set the work of this run against its time.

    Args:
        rows: All result rows of the selection, those of earlier runs included.
        metric: Name of the metric behind `score`; None drops all scores.
        elapsed_s: Wall-clock time of this run.
        resumed_ids: Ids of rows from an earlier run; they count everywhere but in the rates.
    """
    rows = list(rows)
    resumed = frozenset(resumed_ids)
    answered = [row for row in rows if not is_failed(row)]
    new = [row for row in answered if row["sample_id"] not in resumed]
    counts = _count(rows, metric)
    by_family: dict[str, list[Row]] = {}
    for row in rows:
        by_family.setdefault(_family_of(row), []).append(row)
    families = (
        FamilySummary(name=name, **_count(by_family[name], metric)) for name in _sorted_families(by_family)
    )
    return Summary(
        **counts,
        num_resumed=sum(row["sample_id"] in resumed for row in rows),
        metric=metric,
        score_with_failures=_score_with_failures(rows, metric),
        families=() if set(by_family) <= {NO_FAMILY} else tuple(families),
        elapsed_s=elapsed_s,
        samples_per_s=_rate(len(new), elapsed_s),
        tokens_per_s=_rate(_sum_tokens(new, "num_completion_tokens"), elapsed_s),
        num_prompt_tokens=_sum_tokens(answered, "num_prompt_tokens"),
        num_completion_tokens=_sum_tokens(answered, "num_completion_tokens"),
    )


def _count(rows: Sequence[Row], metric: str | None) -> dict[str, Any]:
    num_failed = sum(map(is_failed, rows))
    scores = _scores(rows) if metric is not None else []
    return {
        "num_rows": len(rows),
        "num_answered": len(rows) - num_failed,
        "num_failed": num_failed,
        "num_scored": len(scores),
        "score": _mean(scores, len(scores)),
    }


def _score_with_failures(rows: Sequence[Row], metric: str | None) -> float | None:
    if metric is None:
        return None
    # A failed row without answers would not have been scored, so it is not a wrong answer either.
    # Rows that do not carry their answers are taken to have some.
    num_wrong = sum(is_failed(row) and ("answers" not in row or _has_answers(row)) for row in rows)
    scores = _scores(rows)
    return _mean(scores, len(scores) + num_wrong)


def _has_answers(row: Row) -> bool:
    answers = row["answers"]
    return answers is not None and len(answers) > 0


def _scores(rows: Iterable[Row]) -> list[float]:
    scores = (read_number(row.get("score")) for row in rows if not is_failed(row))
    return [score for score in scores if score is not None]


def _mean(values: Sequence[float], num_values: int) -> float | None:
    # fsum: the mean does not depend on the order in which workers finished.
    return math.fsum(values) / num_values if num_values else None


def _rate(amount: int, elapsed_s: float) -> float | None:
    return amount / elapsed_s if amount and elapsed_s > 0 else None


def _sum_tokens(rows: Iterable[Row], key: str) -> int:
    return sum(int(read_number(row.get(key)) or 0) for row in rows)


# ---------------------------------------------------------------------------------------------
# Gallery: which samples
# ---------------------------------------------------------------------------------------------


# Places kept for each group when all of them overflow: the wrong ones tell most, yet a gallery
# without a right one would hide what the model can do.
_GALLERY_SHARES: tuple[tuple[tuple[Verdict, ...], float], ...] = (
    (("wrong", "partial"), 0.5),
    (("failed",), 0.2),
    (("right", "unscored"), 0.3),
)


def choose_gallery(rows: Iterable[Row], limit: int = 60) -> list[Row]:
    """Choose rows to show: wrong ones first, then failed, then right ones, spread over families.

    The choice depends on the rows alone, not on their order. Wrong rows get half of the places,
    failed ones a fifth, right ones the rest; places one group leaves free go to the others.
    """
    groups: list[list[Row]] = [[] for _ in _GALLERY_SHARES]
    for row in rows:
        verdict = verdict_of(read_number(row.get("score")), row.get("error"))
        index = next(i for i, (verdicts, _) in enumerate(_GALLERY_SHARES) if verdict in verdicts)
        groups[index].append(row)
    sizes = [
        min(len(group), int(limit * share)) for group, (_, share) in zip(groups, _GALLERY_SHARES, strict=True)
    ]
    for index in (0, 2, 1):  # failed rows take what is left last: they look alike, and are listed by cause
        sizes[index] += max(0, min(len(groups[index]) - sizes[index], limit - sum(sizes)))
    return [row for group, size in zip(groups, sizes, strict=True) for row in _spread(group)[:size]]


def _spread(rows: Iterable[Row]) -> list[Row]:
    """Deal rows out family by family, so that any prefix shows all families about equally."""
    by_family: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["sample_id"]):
        by_family.setdefault(_family_of(row), []).append(row)
    dealt = zip_longest(*(by_family[name] for name in _sorted_families(by_family)))
    return [row for row in chain.from_iterable(dealt) if row is not None]
