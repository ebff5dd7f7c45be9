"""A run in numbers: scores by family, failures, rates, and which answers to show.

Rows are taken one by one, in any order, and not kept. They are mappings with the keys `sample_id`, `family`,
`score` (None where there is nothing to compare with), `error` (None where the row was answered),
`num_prompt_tokens` and `num_completion_tokens`; those that were to be of a form have `parsed` and
`keeps_form`.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from operator import itemgetter
from typing import Any

from vlmray.inference.certainty.assessing import Certainty
from vlmray.inference.chunks import Reuse
from vlmray.inference.drawing.assessing import Drawn
from vlmray.reports.errors import NO_FAMILY, is_failed
from vlmray.reports.gallery import Verdict, verdict_of
from vlmray.reports.text import read_number
from vlmray.schema import Row

_MOST_SCORES = 4096
"""Scores that are kept before they are summed up."""


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
class Usage:
    """What a run had of the cluster."""

    unit: str
    """What is counted: GPU, or replica where replicas have none."""

    held_s: float
    """Seconds of all units from when each began to load the model to the run's last answer."""

    used_s: float
    """Seconds of them in which a model worked on answers."""

    answers_per_hour: float | None
    """Rows answered for each hour that a unit was held."""

    cost: float | None
    """What that took, where the price of a unit is known."""

    cost_of_1000: float | None
    """What 1,000 answers took of it."""

    cached_share: float | None
    """Share of the prompts' tokens that prefix caches had; None where the engine does not say."""

    energy_kwh: float | None
    """What the GPUs took, each from when loading began to its last answer, others' work on them included;
    None where their driver does not tell."""

    energy_of_1000_wh: float | None
    """What 1,000 answers took of it, in watt-hours."""

    @classmethod
    def of(
        cls, *, unit: str, held_s: float, used_s: float, num_answered: int, price_per_hour: float | None,
        cached_share: float | None = None, energy_kwh: float | None = None,
    ) -> Usage:  # fmt: skip
        """Set answers, price and energy against the time."""
        cost = None if price_per_hour is None else held_s / 3600 * price_per_hour
        energy_wh = None if energy_kwh is None else 1000 * energy_kwh
        return cls(
            unit=unit,
            held_s=held_s,
            used_s=used_s,
            answers_per_hour=_rate(num_answered, held_s / 3600),
            cost=cost,
            cost_of_1000=_of_1000(cost, num_answered),
            cached_share=cached_share,
            energy_kwh=energy_kwh,
            energy_of_1000_wh=_of_1000(energy_wh, num_answered),
        )


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

    num_formed: int = 0
    """Answered rows that were to be of a form: JSON, a choice, what an expression matches."""

    num_keep_form: int = 0
    """How many of them are."""

    num_parsed: int = 0
    """How many of them are JSON, where that was asked for."""

    num_identical: int = 0
    """Answers of this run that were taken over from rows that ask the same; the rates count them."""

    num_from_cache: int = 0
    """Answers of this run that were taken over from earlier ones; likewise."""

    usage: Usage | None = None
    """What this run had of the cluster; None where it answered nothing."""

    certainty: Certainty | None = None
    """How far the model's confidence can be relied on; None where there are no scores, or no confidences."""

    drawn: Drawn | None = None
    """What the draws are worth, where several answers are drawn to each row."""


@dataclass(slots=True)
class _Counts:
    """Running counts of the rows of a family."""

    num_rows: int = 0
    num_failed: int = 0
    num_scored: int = 0
    scores: list[float] = field(default_factory=list)
    """Numbers whose sum is that of all scores, to the last digit."""

    def add(self, row: Row) -> None:
        self.num_rows += 1
        if is_failed(row):
            self.num_failed += 1
        elif (score := read_number(row.get("score"))) is not None:
            self.num_scored += 1
            self.scores.append(score)
            if len(self.scores) > _MOST_SCORES:
                self.scores = _exact_sum(self.scores)

    def values(self, metric: str | None) -> dict[str, Any]:
        return {
            "num_rows": self.num_rows,
            "num_answered": self.num_rows - self.num_failed,
            "num_failed": self.num_failed,
            "num_scored": 0 if metric is None else self.num_scored,
            "score": None if metric is None else _mean(self.scores, self.num_scored),
        }


class Tally:
    """A run's result rows, counted one by one in any order; rows of earlier runs count but in the rates."""

    def __init__(self, metric: str | None) -> None:
        """Begin without rows.

        Args:
            metric: Name of the metric behind `score`; None drops all scores.
        """
        self._metric = metric
        self._families: dict[str, _Counts] = {}
        self._num_wrong = 0  # failed rows that have answers
        self._num_resumed = self._num_new = self._num_new_tokens = 0
        self._num_prompt_tokens = self._num_completion_tokens = 0
        self._num_formed = self._num_keep_form = self._num_parsed = 0

    def add(self, row: Row, *, is_resumed: bool = False) -> None:
        """Count a row, which may be one of an earlier run."""
        self._families.setdefault(_family_of(row), _Counts()).add(row)
        self._num_resumed += is_resumed
        if is_failed(row):
            # One without answers would not have been scored, so it is not a wrong answer either. Rows that
            # do not carry their answers are taken to have some.
            self._num_wrong += "answers" not in row or _has_answers(row)
            return
        num_written = _read_count(row, "num_completion_tokens")
        self._num_prompt_tokens += _read_count(row, "num_prompt_tokens")
        self._num_completion_tokens += num_written
        self._num_formed += row.get("keeps_form") is not None
        self._num_keep_form += bool(row.get("keeps_form"))
        self._num_parsed += row.get("parsed") is not None
        if not is_resumed:
            self._num_new += 1
            self._num_new_tokens += num_written

    @property
    def num_rows(self) -> int:
        """Rows counted so far."""
        return sum(counts.num_rows for counts in self._families.values())

    @property
    def num_new(self) -> int:
        """Rows answered in this run so far."""
        return self._num_new

    def summary(
        self, elapsed_s: float, usage: Usage | None = None, certainty: Certainty | None = None,
        reuse: Reuse | None = None,
        drawn: Drawn | None = None,
    ) -> Summary:  # fmt: skip
        """Mean the scores and set the work of this run against its time.

        Args:
            elapsed_s: Wall-clock time of this run.
            usage: What it had of the cluster.
            certainty: How far its confidences can be relied on.
            reuse: Which of its answers were taken over.
            drawn: What its draws are worth.
        """
        metric, families = self._metric, self._families
        whole = _Counts(
            self.num_rows,
            sum(counts.num_failed for counts in families.values()),
            sum(counts.num_scored for counts in families.values()),
            [score for counts in families.values() for score in counts.scores],
        )
        named = (
            FamilySummary(name=name, **families[name].values(metric)) for name in _sorted_families(families)
        )
        return Summary(
            **whole.values(metric),
            num_resumed=self._num_resumed,
            metric=metric,
            score_with_failures=(
                None if metric is None else _mean(whole.scores, whole.num_scored + self._num_wrong)
            ),
            families=() if set(families) <= {NO_FAMILY} else tuple(named),
            elapsed_s=elapsed_s,
            samples_per_s=_rate(self._num_new, elapsed_s),
            tokens_per_s=_rate(self._num_new_tokens, elapsed_s),
            num_prompt_tokens=self._num_prompt_tokens,
            num_completion_tokens=self._num_completion_tokens,
            num_formed=self._num_formed,
            num_keep_form=self._num_keep_form,
            num_parsed=self._num_parsed,
            **(reuse or Reuse())._asdict(),
            usage=usage,
            certainty=certainty,
            drawn=drawn,
        )


def _has_answers(row: Row) -> bool:
    answers = row["answers"]
    return answers is not None and len(answers) > 0


def _exact_sum(values: Sequence[float]) -> list[float]:
    """Return a few numbers whose sum is that of the values, without any rounding."""
    parts: list[float] = []
    while rest := math.fsum([*values, *(-part for part in parts)]):
        parts.append(rest)
    return parts


def _mean(values: Sequence[float], num_values: int) -> float | None:
    # fsum: the mean does not depend on the order in which workers finished.
    return math.fsum(values) / num_values if num_values else None


def _rate(amount: int, elapsed_s: float) -> float | None:
    return amount / elapsed_s if amount and elapsed_s > 0 else None


def _of_1000(whole: float | None, num_answered: int) -> float | None:
    return None if whole is None or not num_answered else 1000 * whole / num_answered


def _read_count(row: Row, key: str) -> int:
    return int(read_number(row.get(key)) or 0)


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


class GalleryChoice:
    """Rows to show: wrong ones first, then failed, then right ones, spread over families.

    The choice depends on the rows alone, not on the order in which they are added; no more are kept on the
    way than may be shown. Wrong rows get half of the places, failed ones a fifth, right ones the rest; places
    one group leaves free go to the others.
    """

    def __init__(self, limit: int = 60) -> None:
        """Begin without rows.

        Args:
            limit: Places to fill.
        """
        self._limit = limit
        self._groups: list[dict[str, list[Row]]] = [{} for _ in _GALLERY_SHARES]

    def add(self, row: Row) -> None:
        """Keep a row if it may be shown: as one of the first of the first families of its group."""
        verdict = verdict_of(read_number(row.get("score")), row.get("error"))
        index = next(i for i, (verdicts, _) in enumerate(_GALLERY_SHARES) if verdict in verdicts)
        group, family = self._groups[index], _family_of(row)
        kept = group.setdefault(family, [])
        if len(kept) == self._limit and (not kept or row["sample_id"] > kept[-1]["sample_id"]):
            return
        bisect.insort(kept, row, key=itemgetter("sample_id"))
        del kept[self._limit :]
        if len(group) > self._limit:
            del group[_sorted_families(group)[-1]]

    def chosen(self) -> list[Row]:
        """Return the rows to show, in their order."""
        groups = [_spread(group) for group in self._groups]
        sizes = [
            min(len(group), int(self._limit * share))
            for group, (_, share) in zip(groups, _GALLERY_SHARES, strict=True)
        ]
        # Failed rows take what is left last: they look alike, and are listed by cause.
        for index in (0, 2, 1):
            sizes[index] += max(0, min(len(groups[index]) - sizes[index], self._limit - sum(sizes)))
        return [row for group, size in zip(groups, sizes, strict=True) for row in group[:size]]


def _spread(by_family: Mapping[str, Sequence[Row]]) -> list[Row]:
    """Deal rows out family by family, so that any prefix shows all families about equally."""
    dealt = zip_longest(*(by_family[name] for name in _sorted_families(by_family)))
    return [row for row in chain.from_iterable(dealt) if row is not None]
