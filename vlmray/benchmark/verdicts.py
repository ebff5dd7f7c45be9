"""What a comparison found, as values."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmray.benchmark.judge.asking import Judged
from vlmray.benchmark.judge.report import to_json as judge_json
from vlmray.benchmark.scoreboard import GroupDifference, GroupMargin, Scoreboard
from vlmray.benchmark.slices.finding import SliceSearch
from vlmray.benchmark.speed import SpeedPoint
from vlmray.inference.certainty.assessing import Certainty
from vlmray.inference.drawing.assessing import Drawn
from vlmray.metrics.significance import Difference, num_samples_for
from vlmray.reports.errors import ErrorGroup
from vlmray.reports.gallery import GalleryItem
from vlmray.reports.text import format_points


@dataclass(frozen=True, kw_only=True)
class Results:
    """A benchmark as the renderers need it."""

    title: str
    models: Mapping[str, str]
    """What each name stands for."""

    board: Scoreboard | None
    """None where speed alone was measured."""

    certainty: tuple[Certainty, ...] = ()
    """Of the models whose confidence is known."""

    drawn: tuple[Drawn, ...] = ()
    """Of the models that several answers were drawn from to each sample."""

    judged: Judged | None = None
    """What a judge made of the answers, where there is one."""

    against_baseline: Mapping[str, GroupDifference]
    """Each model against the one that had its name in the earlier run."""

    speed: tuple[SpeedPoint, ...]
    price_per_hour: float | None
    errors: Mapping[str, tuple[ErrorGroup, ...]]
    num_samples: int
    galleries: Mapping[str, tuple[int, Sequence[GalleryItem]]]
    """Number of samples and some of them, by what became of them."""

    elapsed_s: float
    slices: SliceSearch | None = None
    """Where models are worse than the first; None where there is nothing to compare or to break down."""

    slice_items: Sequence[Sequence[GalleryItem]] = ()
    """Some samples of each slice that was found."""

    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_answered(self) -> int:
        """Answers of all models; where speed alone was measured, requests."""
        if self.board is None:
            return sum(point.num_requests - point.num_failed for point in self.speed)
        failed = sum(group.num_rows for groups in self.errors.values() for group in groups)
        return self.num_samples * len(self.models) - failed

    @functools.cached_property
    def verdicts(self) -> list[str]:
        """Plain sentences: whether each model is better than the first, and than it was."""
        board = self.board
        if board is None:
            return []
        found = [board.difference(model, board.metrics[0]) for model in board.models[1:]]
        return [
            *(sentence(difference) for difference in found),
            *map(margin_sentence, board.margins, found),
            *self._worse_slices(board.models[0], board.models[1:]),
            *(sentence(difference) for difference in self.against_baseline.values()),
        ]

    @property
    def thresholds(self) -> list[str]:
        """Plain sentences: from which confidence on answers are as good as is wanted."""
        return [each.sentence for each in self.certainty if each.threshold]

    def _worse_slices(self, base: str, models: Sequence[str]) -> list[str]:
        found = self.slices
        return [found.sentence(model, base) for model in models if found.of(model)] if found else []

    def to_json(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        board = self.board
        bleu = board.bleu if board else {}
        return {
            "models": dict(self.models),
            "verdicts": self.verdicts,
            "scores": [dataclasses.asdict(score) for score in board.scores] if board else [],
            "differences": [
                {**dataclasses.asdict(difference), "verdict": difference.verdict}
                for difference in (board.differences if board else ())
            ],
            "margins": [
                {**dataclasses.asdict(margin), "holds": margin.holds}
                for margin in (board.margins if board else ())
            ],
            "slices": self.slices.to_json() if self.slices else None,
            "certainty": {found.model: found.to_json() for found in self.certainty},
            "drawn": {found.model: found.to_json() for found in self.drawn},
            "bleu": {name: {"score": score, "signature": text} for name, (score, text) in bleu.items()},
            "against_baseline": {
                name: dataclasses.asdict(found.difference) for name, found in self.against_baseline.items()
            },
            "judge": judge_json(self.judged, board) if self.judged and board else None,
            "speed": [dataclasses.asdict(point) for point in self.speed],
            "failed": {name: sum(group.num_rows for group in found) for name, found in self.errors.items()},
            "elapsed_s": self.elapsed_s,
        }


def sentence(found: GroupDifference) -> str:
    """Say in a plain sentence what came of a comparison."""
    difference = found.difference
    where = "" if found.kind == "all" else f" on {found.group}"
    sign = "" if found.p_corrected < 0.001 else "= "
    details = (
        f"{format_points(difference.mean)} points of {found.metric}, 95 % interval "
        f"{format_range(difference)}, p {sign}{format_p(found.p_corrected)} "
        f"({difference.num_samples:,} samples, {difference.num_images:,} images)."
    )
    if found.verdict == "too few images":
        return (
            f"{found.model} against {found.base}{where}: too few images to show anything "
            f"({found.fewest_images:,} are the fewest that can): {details}"
        )
    if found.verdict != "no significant change":
        return f"{found.model} is {found.verdict} than {found.base}{where}: {details}"
    text = f"{found.model} against {found.base}{where}: no significant change: {details}"
    if difference.smallest is None:
        return f"{text} No answer scores differently."
    smallest = f"{100 * difference.smallest:.1f}"
    return f"{text} A difference of {smallest} points would have shown in 4 of 5 such samples."


def margin_sentence(found: GroupMargin, difference: GroupDifference) -> str:
    """Say in a plain sentence whether a model is not much worse, and if not, what might show it."""
    test = found.test
    points = f"{100 * test.margin:g} points of {found.metric}"
    sign = "" if found.p_corrected < 0.001 else "= "
    details = f"one-sided 95 % bound {format_points(test.low)} points, p {sign}{format_p(found.p_corrected)}."
    if found.holds:
        return f"{found.model} is not worse than {found.base} by more than {points}: {details}"
    text = f"{found.model} is not shown to be no worse than {found.base} by more than {points}: {details}"
    needed = num_samples_for(difference.difference, test.margin, two_sided=False)
    if difference.verdict == "worse" or needed is None or needed <= found.num_samples:
        return text
    return f"{text} If they are equal, {needed:,} such samples would show it in 4 of 5 cases."


def format_range(difference: Difference) -> str:
    """Format the interval of a difference, in points."""
    return f"{format_points(difference.low)} to {format_points(difference.high)}"


def format_p(value: float) -> str:
    """Format the p-value of a test."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"
