"""On which parts of a dataset a model got worse: all that it is broken down by is looked at, and paid for.

    Scoreboard -> find_worse -> SliceSearch

Whoever looks at many parts finds a bad one by chance. So the test of each, whether the model is worse there,
one-sided, is corrected for all parts, of all kinds, and for all models (Holm): where nothing changed, 95 of
100 searches find nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmray.benchmark.samples import SampleFacts
from vlmray.benchmark.scoreboard import GroupDifference, Scoreboard
from vlmray.benchmark.slices.groups import break_down
from vlmray.metrics.significance import ALPHA, holm
from vlmray.reports.text import format_points

FEWEST_IMAGES = 10
"""Parts with fewer are not looked at: they can show little, and would cost the others as much as any."""

_NUM_NAMED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class WorseSlice:
    """A part of the dataset on which a model is worse than the first."""

    found: GroupDifference
    """Its p-value is one-sided, and corrected for all that was looked at."""

    lost: tuple[str, ...]
    """Ids of the samples that it answers worse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceSearch:
    """What was looked at, and what was found."""

    kinds: tuple[str, ...]
    num_slices: int
    """Parts that were looked at."""

    worse: tuple[WorseSlice, ...]
    """Those with the largest losses first."""

    def of(self, model: str) -> list[WorseSlice]:
        """Return what was found of a model."""
        return [each for each in self.worse if each.found.model == model]

    def sentence(self, model: str, base: str) -> str:
        """Say of a model that is worse on some parts on which ones."""
        found = self.of(model)
        worst = [f"{name_slice(each.found)} ({format_points(each.found.difference.mean)})" for each in found]
        more = f" and {len(worst) - _NUM_NAMED} more" if len(worst) > _NUM_NAMED else ""
        return (
            f"{model} is worse than {base} on {len(found)} of {self.num_slices} slices, in points: "
            f"{', '.join(worst[:_NUM_NAMED])}{more}."
        )

    def to_json(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        return {
            "kinds": list(self.kinds),
            "num_slices": self.num_slices,
            "worse": [{**dataclasses.asdict(each.found), "lost": list(each.lost)} for each in self.worse],
        }


def find_worse(board: Scoreboard, samples: Sequence[SampleFacts]) -> SliceSearch:
    """Find the parts on which models are worse than the first, by the deciding metric.

    Args:
        board: What the answers are worth.
        samples: What was asked.
    """
    metric = board.metrics[0]
    looked_at = [
        each for each in board.differences
        if each.kind != "all" and each.difference.num_images >= FEWEST_IMAGES
    ]  # fmt: skip
    found = [
        dataclasses.replace(each, p_corrected=p_value, num_comparisons=len(looked_at))
        for each, p_value in zip(looked_at, holm([_p_worse(each) for each in looked_at]), strict=True)
        if p_value < ALPHA
    ]
    found.sort(key=lambda each: each.difference.mean)
    scored = board.answers[board.models[0], metric]
    asked = [sample for sample in samples if sample.sample_id in scored]
    groups = break_down(asked) if found else {}

    def lost(each: GroupDifference) -> tuple[str, ...]:
        names = [asked[place].sample_id for place in groups[each.kind][each.group]]
        before, after = board.answers[board.models[0], metric], board.answers[each.model, metric]
        return tuple(name for name in names if after[name] < before[name])

    return SliceSearch(
        kinds=tuple(dict.fromkeys(each.kind for each in looked_at)),
        num_slices=len({(each.kind, each.group) for each in looked_at}),
        worse=tuple(WorseSlice(found=each, lost=lost(each)) for each in found),
    )


def name_slice(found: GroupDifference) -> str:
    """Name a part so that it is understood without its kind."""
    return f"{found.kind} {found.group}"


def _p_worse(found: GroupDifference) -> float:
    """Return the p-value of the question whether a model is worse; the test's signs are flipped alike."""
    half = found.difference.p_value / 2
    return half if found.difference.mean < 0 else 1 - half
