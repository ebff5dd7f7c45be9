"""From the draws of rows to what a report says of them; draws nothing itself.

score, scores of all draws, agreement and image of each row -> assess_draws -> Drawn -> sentence, to_json
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vlmray.inference.certainty.assessing import Certainty, assess
from vlmray.metrics.draws import pass_at_k, powers_to
from vlmray.metrics.significance import Interval, mean_interval
from vlmray.reports.text import format_percent


class DrawnRow(NamedTuple):
    """What counts of a row to which several answers were drawn."""

    agreement: float | None
    """Share of them that say what the prediction says; None: the row failed."""

    score: float | None
    """Of the prediction; None: there is nothing to compare with."""

    scores: Sequence[float] | None
    """Of all draws, where the prediction has one."""

    image: Any
    """What tells images apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What several draws of each answer are worth."""

    model: str
    """What it is called; empty where there is one."""

    num_samples: int
    """How many were drawn."""

    agreement: float | None
    """Mean share of draws that say what the prediction says; None where all rows failed."""

    metric: str
    majority: Interval | None
    """Score of the predictions; None where there are no answers to compare with."""

    passes: Mapping[int, Interval]
    """Score of the best of k draws, by k."""

    certainty: Certainty | None
    """How far the agreement of a row can be relied on, as other confidences are."""

    knows_images: bool = True
    """Whether samples about one image are taken together."""

    @property
    def sentence(self) -> str:
        """Say in a line what the draws are worth."""
        subject = f"{self.model}, " if self.model else ""
        said = [f"agreement {format_percent(self.agreement)}"]
        said += [f"vote {format_percent(self.majority.mean)}"] if self.majority else []
        ends = (1, self.num_samples) if self.passes else ()
        said += [f"pass@{k} {format_percent(self.passes[k].mean)}" for k in ends]
        return f"{subject}{self.num_samples} draws: {', '.join(said)}"

    def figures(self) -> dict[str, float | None]:
        """Return the numbers that say most, by names that trackers take."""
        return {
            "agreement": self.agreement,
            **{f"pass_at_{k}": found.mean for k, found in self.passes.items()},
        }

    def to_json(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        return {
            "num_samples": self.num_samples,
            "agreement": self.agreement,
            "metric": self.metric,
            "majority": self.majority and dataclasses.asdict(self.majority),
            "pass_at": {str(k): dataclasses.asdict(found) for k, found in self.passes.items()},
            "certainty": self.certainty and self.certainty.to_json(),
        }


def assess_draws(
    rows: Sequence[DrawnRow], *, num_samples: int, metric: str, model: str = "", knows_images: bool = True
) -> Drawn:
    """Score the vote and the best of some draws, and see how far agreement tells right from wrong.

    Args:
        rows: All that count.
        num_samples: Answers that were drawn to each.
        metric: Name of the metric of their scores.
        model: What it is called, where there are several.
        knows_images: Whether samples about one image are told as such.
    """
    agreements = [row.agreement for row in rows if row.agreement is not None]
    scored = [row for row in rows if row.score is not None and row.scores is not None]
    images = [row.image for row in scored]
    scores = np.array([row.scores for row in scored])
    tries = powers_to(num_samples) if scored else ()
    return Drawn(
        model=model,
        num_samples=num_samples,
        agreement=float(np.mean(agreements)) if agreements else None,
        metric=metric,
        majority=mean_interval([row.score or 0.0 for row in scored], images) if scored else None,
        passes={k: mean_interval(pass_at_k(scores, k), images) for k in tries},
        certainty=assess(
            ((row.agreement, row.score or 0.0, row.image) for row in scored if row.agreement is not None),
            metric=metric, num_asked=len(scored), target=None, model=model, knows_images=knows_images,
        ),
        knows_images=knows_images,
    )  # fmt: skip
