"""What a judge made of the answers, as tables and JSON; asks nothing."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

from vlmray.benchmark.judge.asking import Judged
from vlmray.benchmark.judge.settings import JUDGE
from vlmray.benchmark.scoreboard import Scoreboard
from vlmray.metrics.significance import Interval, mean_interval
from vlmray.reports.errors import ErrorGroup, group_errors
from vlmray.reports.tables import Column, Table, ranged_cell

_HALF = 0.5
ITSELF = "itself, asked again"


def agreements(judged: Judged, board: Scoreboard) -> dict[str, Interval]:
    """Return the share of answers of which judge and another agree, by the name of the other.

    With itself: the same grade, when the grades are named in the opposite order. With a rule: both give at
    least half of full marks, or both less.
    """
    found = {}
    twice = {key: (judged.first[key].grade, again.grade) for key, again in judged.again.items()}
    same = {key: first == again for key, (first, again) in twice.items() if first and again}
    if same:
        found[ITSELF] = _share(judged, same)
    for rule in (metric for metric in board.metrics if metric != JUDGE):
        alike = {
            (model, sample_id): (judged.config.scale[each.grade] >= _HALF)
            == (board.answers[model, rule][sample_id] >= _HALF)
            for (model, sample_id), each in judged.first.items() if each.grade is not None
        }  # fmt: skip
        if alike:
            found[rule] = _share(judged, alike)
    return found


def _share(judged: Judged, alike: Mapping[tuple[str, str], bool]) -> Interval:
    return mean_interval([*map(float, alike.values())], [judged.images[sample_id] for _, sample_id in alike])


def ungraded(judged: Judged) -> tuple[ErrorGroup, ...]:
    """Group the answers without a grade by cause."""
    return group_errors(
        {"sample_id": f"{model}: {sample_id}", "error": found.error}
        for (model, sample_id), found in judged.first.items() if found.error is not None
    )  # fmt: skip


def to_json(judged: Judged, board: Scoreboard) -> dict[str, Any]:
    """Return all figures as JSON values."""
    scale = judged.config.scale
    return {
        "config": judged.config.to_json(),
        "num_graded": sum(found.grade is not None for found in judged.first.values()),
        "num_ungraded": judged.num_failed,
        "causes": [{"cause": group.cause, "num_answers": group.num_rows} for group in ungraded(judged)],
        "grades": {
            model: {grade: counts[grade] for grade in scale} for model, counts in _grades(judged).items()
        },
        "agreement": {
            name: dataclasses.asdict(share) for name, share in agreements(judged, board).items()
        },
    }  # fmt: skip


def judge_tables(judged: Judged, board: Scoreboard) -> list[Table]:
    """Tell which grades there were, how far the judge is to be trusted, and which are missing."""
    counts = _grades(judged)
    tables = [
        Table(
            title=f"Grades by {judged.config.model_id}",
            columns=(Column("grade"), Column("worth", True), *(Column(model, True) for model in counts)),
            rows=tuple(
                (grade, f"{worth:g}", *(f"{counts[model][grade]:,}" for model in counts))
                for grade, worth in judged.config.scale.items()
            ),
            note="Answers; rows that failed were not shown to the judge, and count as wrong.",
        )
    ]
    if found := agreements(judged, board):
        rows = [
            (name, f"{share.num_samples:,}", ranged_cell(share.mean, share.low, share.high))
            for name, share in found.items()
        ]
        tables.append(
            Table(
                title="Whom the judge agrees with",
                columns=(Column("with"), Column("answers", True), Column("agree", True)),
                rows=tuple(rows),
                note=(
                    "With itself: the same grade when the grades are named in the opposite order. With a "
                    "rule: both give at least half of full marks, or both less. Intervals: 95 %, bootstrap "
                    "over images."
                ),
            )
        )
    if causes := ungraded(judged):
        tables.append(
            Table(
                title="Answers without a grade",
                columns=(Column("cause"), Column("answers", True)),
                rows=tuple((group.cause, f"{group.num_rows:,}") for group in causes),
                note=(
                    "A sample counts for the metric judge if the answers of all models to it are graded. The "
                    "same command asks for the missing grades again."
                ),
            )
        )
    return tables


def ungraded_line(judged: Judged) -> str | None:
    """Say in a line how many answers have no grade, and the commonest cause; None where all have one."""
    if not judged.num_failed:
        return None
    cause = ungraded(judged)[0].cause
    return f"judge: {judged.num_failed:,} of {len(judged.first):,} answers have no grade ({cause})"


def _grades(judged: Judged) -> dict[str, Counter[str | None]]:
    counts: dict[str, Counter[str | None]] = {}
    for (model, _), found in judged.first.items():
        counts.setdefault(model, Counter())[found.grade] += 1
    return counts
