"""From confidences and scores to what a report says of them; draws nothing.

confidence, score and image of each answer -> assess -> Certainty -> sentence, to_json
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vlmray.metrics.calibration import Calibration, Threshold, calibrate, find_threshold, risk_coverage
from vlmray.reports.text import format_percent

_MOST_POINTS = 400

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Certainty:
    """How far a model's confidence can be relied on."""

    model: str
    """What it is called; empty where there is one."""

    metric: str
    num_asked: int
    """Samples that have answers to compare with."""

    calibration: Calibration
    curve: tuple[tuple[float, float], ...]
    """Share of the samples that are answered, and how much of these answers is wrong, the surest first."""

    threshold: Threshold | None
    """Where an accuracy is wanted."""

    knows_images: bool = True
    """Whether samples about one image are taken together."""

    @property
    def sentence(self) -> str:
        """Say what the wanted accuracy costs."""
        found = self.threshold
        assert found is not None
        subject = f"{self.model}: " if self.model else ""
        wanted = f"{self.metric} of at least {format_percent(found.target)}"
        sure = f"{100 * found.level:g} % sure"
        if found.confidence is None or found.accuracy is None:
            surest = self.calibration.bins[-1].accuracy.mean
            here = f"the surest tenth have {format_percent(surest)} here"
            more = "more samples might show one: " if surest >= found.target else ""
            return f"{subject}no confidence is shown to keep {wanted} ({sure}); {more}{here}."
        return (
            f"{subject}from a confidence of {found.confidence:.6g} on, answers keep {wanted} ({sure}): "
            f"{format_percent(found.coverage)} of the {self.num_asked:,} samples, and here they have "
            f"{format_percent(found.accuracy)}."
        )

    def to_json(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        return {
            "metric": self.metric,
            "num_asked": self.num_asked,
            "calibration": dataclasses.asdict(self.calibration),
            "risk_coverage": [list(point) for point in self.curve],
            "threshold": self.threshold and dataclasses.asdict(self.threshold),
        }


def assess(
    answers: Iterable[tuple[float | None, float, Any]],
    *,
    metric: str,
    num_asked: int,
    target: float | None,
    model: str = "",
    knows_images: bool = True,
) -> Certainty | None:
    """Compare confidences with scores; None where no confidence is known.

    Args:
        answers: Confidence, score, and what tells images apart, of each answer that has a score.
        metric: Name of the metric of the scores.
        num_asked: Samples that have answers to compare with, those that failed included.
        target: Wanted accuracy, or None.
        model: What it is called, where there are several.
        knows_images: Whether samples about one image are told as such.
    """
    scored = list(answers)
    known = [(confidence, score, image) for confidence, score, image in scored if confidence is not None]
    if target is not None and len(known) < len(scored):
        _LOG.warning(
            "%s%s of %s answers have no confidence, as an earlier run or the server gave none; "
            "--target_accuracy goes by the others, --overwrite asks for all again",
            f"{model}: " if model else "", f"{len(scored) - len(known):,}", f"{len(scored):,}",
        )  # fmt: skip
    if not known:
        return None
    sure, right, images = zip(*known, strict=True)
    points = risk_coverage(sure, right, num_asked).tolist()
    step = -(-len(points) // _MOST_POINTS)
    return Certainty(
        model=model, metric=metric, num_asked=num_asked, calibration=calibrate(sure, right, images),
        curve=tuple((share, risk) for share, risk in [*points[:-1:step], points[-1]]),
        threshold=(
            None if target is None else find_threshold(sure, right, images, target, num_asked=num_asked)
        ),
        knows_images=knows_images,
    )  # fmt: skip
