"""What several models' answers to the same samples are worth: scores, differences, verdicts.

    Sample facts, result rows of each model -> score_models -> Scoreboard

The first model is the one that the others are compared with. A failed row counts as wrong: a model does not
get better by failing where it would have been wrong. Rows whose dataset publishes no answer count nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from vlmray import metrics
from vlmray.benchmark.judge.settings import JUDGE
from vlmray.benchmark.samples import SampleFacts
from vlmray.benchmark.slices.groups import break_down
from vlmray.metrics.significance import (
    ALPHA,
    Difference,
    Interval,
    MarginTest,
    holm,
    mean_interval,
    not_worse,
    paired_difference,
)
from vlmray.schema import Row

Rows = Mapping[str, Mapping[str, Row]]
"""Result rows by model and sample id."""

Grades = Mapping[tuple[str, str], float]
"""What a judge found answers worth, 0 to 1, by model and sample id."""

Verdict = Literal["better", "worse", "no significant change", "too few images"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupScore:
    """A model's score on a group of samples."""

    model: str
    metric: str
    kind: str
    """What the group is one of: all, family, answer, question or image size."""

    group: str
    interval: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupDifference:
    """A model against the first one on a group of samples."""

    model: str
    base: str
    metric: str
    kind: str
    group: str
    difference: Difference
    p_corrected: float
    """p-value for having asked this of several groups or models (Holm)."""

    num_comparisons: int = 1
    """How many groups and models that were."""

    @property
    def verdict(self) -> Verdict:
        """Say what came of it."""
        if self.p_corrected < ALPHA:
            return "better" if self.difference.mean > 0 else "worse"
        return (
            "no significant change" if self.fewest_images <= self.difference.num_images else "too few images"
        )

    @property
    def fewest_images(self) -> int:
        """Images from which on the test can show anything, if all of them change for the better.

        The chance that `G` images have the same sign is 2 / 2^G, of which the test counts half.
        """
        return 1 + int(math.log2(self.num_comparisons / ALPHA))


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMargin:
    """Whether a model is not much worse than the first one, over all samples."""

    model: str
    base: str
    metric: str
    test: MarginTest
    p_corrected: float
    """p-value for having asked this of several models or datasets (Holm)."""

    num_samples: int

    @property
    def holds(self) -> bool:
        """Whether it was shown to be worse by less than the margin."""
        return self.p_corrected < ALPHA


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoreboard:
    """All that is said of the answers."""

    models: tuple[str, ...]
    metrics: tuple[str, ...]
    scores: tuple[GroupScore, ...]
    differences: tuple[GroupDifference, ...]
    answers: Mapping[tuple[str, str], Mapping[str, float]]
    """Score of each answer: by model and metric, then by sample id."""

    bleu: Mapping[str, tuple[float, str]]
    """Score and signature of each model, where BLEU was asked for; it has no interval here."""

    num_samples: int
    num_images: int
    margins: tuple[GroupMargin, ...] = ()
    """Each model against the first by the deciding metric, where a margin was given."""

    def score(self, model: str, metric: str, kind: str = "all", group: str = "all") -> Interval:
        """Return a model's score on a group."""
        key = (model, metric, kind, group)
        return next(s.interval for s in self.scores if (s.model, s.metric, s.kind, s.group) == key)

    def difference(self, model: str, metric: str, kind: str = "all", group: str = "all") -> GroupDifference:
        """Return a model's difference to the first on a group."""
        key = (model, metric, kind, group)
        return next(d for d in self.differences if (d.model, d.metric, d.kind, d.group) == key)

    def groups(self, kind: str) -> list[str]:
        """Return the groups of a kind."""
        return list(dict.fromkeys(score.group for score in self.scores if score.kind == kind))

    @property
    def kinds(self) -> list[str]:
        """Return what samples are broken down by, where that makes several groups."""
        return [kind for kind in dict.fromkeys(score.kind for score in self.scores) if kind != "all"]


def score_models(
    samples: Sequence[SampleFacts],
    rows: Rows,
    metric_names: Sequence[str],
    *,
    margin: float | None = None,
    grades: Grades = MappingProxyType({}),
    num_resamples: int = 9_999,
) -> Scoreboard:
    """Score every model's answers with every metric.

    The first metric decides, and is broken down by family, kind of answer, length of question and size of
    image. p-values are corrected for the number of models; those of a breakdown for the number of its groups
    and models.

    Args:
        samples: What was asked.
        rows: Result rows by model and sample id; the first model is the one compared with.
        metric_names: Names of `metrics.METRICS`, `bleu` or `judge`.
        margin: By how much a model may be worse than the first, 0 to 1; None: that is not asked.
        grades: What a judge found answers worth; a sample counts for it if those of all models have a grade.
        num_resamples: Draws of each bootstrap and test.

    Raises:
        ValueError: No sample has an answer to compare with, a model lacks one, or a metric has no score.
    """
    asked = [sample for sample in samples if sample.answers]
    if not asked:
        raise ValueError("no sample has an answer to compare with")
    names = tuple(rows)
    for name in names:
        if missing := [sample.sample_id for sample in asked if sample.sample_id not in rows[name]]:
            raise ValueError(f"{name} has no row of {missing[0]}; compare answers to the same samples")
    scored, values = _score_all(asked, rows, [name for name in metric_names if name != metrics.BLEU], grades)
    first = next(iter(scored))
    scores: list[GroupScore] = []
    differences: list[GroupDifference] = []
    for metric, members in scored.items():
        kinds = {"all": {"all": [*range(len(members))]}, **(break_down(members) if metric == first else {})}
        for kind, groups in kinds.items():
            scores += _scores(members, values, names, metric, kind, groups, num_resamples)
            differences += _differences(members, values, names, metric, kind, groups, num_resamples)
    return Scoreboard(
        models=names,
        metrics=tuple(scored),
        scores=tuple(scores),
        differences=tuple(differences),
        answers={
            (model, metric): {s.sample_id: score for s, score in zip(scored[metric], found, strict=True)}
            for (model, metric), found in values.items()
        },
        bleu={name: _bleu(rows[name], asked) for name in names} if metrics.BLEU in metric_names else {},
        num_samples=len(scored[first]),
        num_images=len({sample.image_key for sample in scored[first]}),
        margins=_margins(scored[first], values, names, first, margin, num_resamples) if margin else (),
    )


def _scores(
    asked: Sequence[SampleFacts],
    values: Mapping[tuple[str, str], Sequence[float]],
    names: Sequence[str],
    metric: str,
    kind: str,
    groups: Mapping[str, Sequence[int]],
    num_resamples: int,
) -> list[GroupScore]:
    """Score every model on every group."""
    return [
        GroupScore(
            model=model, metric=metric, kind=kind, group=group,
            interval=mean_interval(
                [values[model, metric][i] for i in members], [asked[i].image_key for i in members],
                num_resamples=num_resamples,
            ),
        )
        for group, members in groups.items() for model in names
    ]  # fmt: skip


def _margins(
    asked: Sequence[SampleFacts],
    values: Mapping[tuple[str, str], Sequence[float]],
    names: Sequence[str],
    metric: str,
    margin: float,
    num_resamples: int,
) -> tuple[GroupMargin, ...]:
    """Test of every model whether it is not worse than the first by more than a margin."""
    base, *others = names
    images = [sample.image_key for sample in asked]
    tests = [
        not_worse(values[base, metric], values[model, metric], images, margin, num_resamples=num_resamples)
        for model in others
    ]
    corrected = holm([test.p_value for test in tests])
    return tuple(
        GroupMargin(
            model=model, base=base, metric=metric, test=test, p_corrected=p_value, num_samples=len(asked)
        )
        for model, test, p_value in zip(others, tests, corrected, strict=True)
    )


def _differences(
    asked: Sequence[SampleFacts],
    values: Mapping[tuple[str, str], Sequence[float]],
    names: Sequence[str],
    metric: str,
    kind: str,
    groups: Mapping[str, Sequence[int]],
    num_resamples: int,
) -> list[GroupDifference]:
    """Compare every model with the first on every group, with p-values for asking all that."""
    base = names[0]
    found = [
        (model, group, paired_difference(
            [values[base, metric][i] for i in members], [values[model, metric][i] for i in members],
            [asked[i].image_key for i in members], num_resamples=num_resamples,
        ))
        for group, members in groups.items() for model in names[1:]
    ]  # fmt: skip
    corrected = holm([difference.p_value for _, _, difference in found])
    return [
        GroupDifference(
            model=model, base=base, metric=metric, kind=kind, group=group, difference=difference,
            p_corrected=p_value, num_comparisons=len(found),
        )
        for (model, group, difference), p_value in zip(found, corrected, strict=True)
    ]  # fmt: skip


def score_answer(metric: str, row: Row, sample: SampleFacts) -> float:
    """Score a result row against the answers of its sample; a failed one is wrong."""
    if row.get("error") is not None:
        return 0.0
    metric = sample.own_metrics.get(metric, metric)
    return metrics.score(metric, row["prediction"] or "", sample.answers, sample.choices).value


def _score_all(
    asked: Sequence[SampleFacts], rows: Rows, metric_names: Sequence[str], grades: Grades
) -> tuple[dict[str, list[SampleFacts]], dict[tuple[str, str], list[float]]]:
    """Return by metric the samples of which all models' answers have a score, and these by model too."""
    scored: dict[str, list[SampleFacts]] = {}
    values: dict[tuple[str, str], list[float]] = {}
    for metric in metric_names:
        found = {name: [_score(metric, name, rows, each, grades) for each in asked] for name in rows}
        whole = [i for i in range(len(asked)) if all(scores[i] is not None for scores in found.values())]
        scored[metric] = [asked[i] for i in whole]
        for name, scores in found.items():
            values[name, metric] = [score for i in whole if (score := scores[i]) is not None]
    return scored, values


def _score(metric: str, model: str, rows: Rows, sample: SampleFacts, grades: Grades) -> float | None:
    """Score a model's answer to a sample; None where the judge gave it no grade."""
    row = rows[model][sample.sample_id]
    if metric == JUDGE and row.get("error") is None:
        return grades.get((model, sample.sample_id))
    return score_answer(metric, row, sample)


def _bleu(rows: Mapping[str, Row], asked: Sequence[SampleFacts]) -> tuple[float, str]:
    predictions = [rows[sample.sample_id].get("prediction") or "" for sample in asked]
    return metrics.corpus_bleu(predictions, [sample.answers for sample in asked])
