"""How well a model's confidence fits how right it is, where samples share images; draws nothing.

    confidences, scores, image of each -> calibrate      -> Calibration: bins, expected calibration error
                                       -> risk_coverage  -> what is wrong of the surest answers
                                       -> find_threshold -> Threshold that keeps a wanted accuracy

As in `significance.py`, what is drawn at random is the image, with all its questions.

Shapes: `N` answers, `G` images, `B` bins, `R` resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from vlmray.metrics.significance import ALPHA, CONFIDENCE, Interval, mean_interval

NUM_BINS = 10
_NUM_RESAMPLES = 1_999
_BATCH = 256  # resamples drawn at a time: G x 256 numbers
_NUM_STEPS = 20
_NUM_DIGITS = 6
_MOST_SCALE = 64.0

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Answers of like confidence."""

    low: float
    high: float
    """Least and largest confidence."""

    confidence: float
    """Mean of the confidence."""

    accuracy: Interval
    """Mean score and its interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How far confidence is from accuracy."""

    bins: tuple[Bin, ...]
    """From the least sure answers on, with about as many in each."""

    error: float
    """Expected calibration error: the mean distance of confidence and accuracy over bins, less what chance
    adds to it."""

    low: float
    high: float
    """Its 95 % interval."""

    plain_error: float
    """The same distance as it is in these answers: chance moves bins apart too, so it is too large."""

    confidence: float
    """Mean of the confidence."""

    accuracy: Interval
    num_samples: int
    num_images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """From which confidence on answers are right as often as wanted."""

    target: float
    """The accuracy that is wanted, 0 to 1."""

    level: float
    """How sure it is that answers of fresh data keep it."""

    confidence: float | None
    """Answers of at least this confidence keep it; None: that is shown of no threshold."""

    accuracy: float | None
    """Mean score of those answers here."""

    num_answers: int
    """How many they are."""

    coverage: float
    """Their share of all that was asked."""


def calibrate(
    confidences: ArrayLike,
    scores: ArrayLike,
    images: Sequence[Any],
    *,
    num_bins: int = NUM_BINS,
    num_resamples: int = _NUM_RESAMPLES,
    seed: int = 0,
) -> Calibration:
    """Compare confidence with accuracy.

    The distances of confidence and accuracy in bins, weighted by their answers, add up to the plain error.
    That has a bias: chance alone moves bins apart. So the interval holds those errors that would show the
    plain error in 95 % of cases, among models whose distances are the found ones times a factor; the factor
    with which half of the cases show more is that of the error. Chance is what a bootstrap over images shows.

    Args:
        confidences: (N,) from 0 to 1.
        scores: (N,) from 0 to 1.
        images: (N,) what tells images apart.
        num_bins: Of equal numbers of answers, as far as their confidence tells them apart.
        num_resamples: Draws of the bootstrap.
        seed: Seeds them.

    Raises:
        ValueError: There are no answers, or not as many of each.
    """
    sure, right, image = _arrays(confidences, scores, images)
    place = _bin(sure, num_bins)
    gaps, sizes = np.zeros((image.max() + 1, place.max() + 1)), np.bincount(image).astype(float)
    np.add.at(gaps, (image, place), sure - right)
    found = gaps.sum(axis=0) / len(sure)
    noise = _noise(gaps, sizes, num_resamples, seed)
    others = found + _unseen(right, image, place, num_resamples, seed)
    error, low, high = _without_bias(found, noise, others)
    whole = mean_interval(right, image.tolist(), num_resamples=num_resamples)
    return Calibration(
        bins=tuple(
            _describe(sure, right, image, place == number, num_resamples) for number in range(place.max() + 1)
        ),
        error=error,
        low=low,
        high=high,
        plain_error=float(np.abs(found).sum()),
        confidence=float(sure.mean()),
        accuracy=whole,
        num_samples=len(sure),
        num_images=len(sizes),
    )


def risk_coverage(confidences: ArrayLike, scores: ArrayLike, num_asked: int | None = None) -> Floats:
    """Return (share of what was asked, mean loss of it) for the surest answers, the surest first: (N, 2).

    Answers of the same confidence are one point; the loss is 1 minus the score.

    Args:
        confidences: (N,) from 0 to 1.
        scores: (N,) from 0 to 1.
        num_asked: Of how many questions these are the answers; None: of as many.
    """
    sure, right, _ = _arrays(confidences, scores, np.arange(len(np.atleast_1d(scores))))
    order = np.argsort(-sure, kind="stable")
    counts = np.arange(1, len(sure) + 1)
    risks = 1 - np.cumsum(right[order]) / counts
    ends = np.append(np.diff(sure[order]) != 0, True)
    points: Floats = np.column_stack([counts / (num_asked or len(sure)), risks])[ends]
    return points


def find_threshold(
    confidences: ArrayLike,
    scores: ArrayLike,
    images: Sequence[Any],
    target: float,
    *,
    num_asked: int | None = None,
    level: float = CONFIDENCE,
) -> Threshold:
    """Find the lowest confidence from which on answers are shown to be right as often as wanted.

    Of thresholds that leave a twentieth, two twentieths, ... of the answers each is tested: the exact
    binomial test, of as many independent answers as those about common images are worth (Korn and Graubard
    1998). They are tested from the strictest on, each at its share of the level and that of those just before
    it that hold (the fallback procedure of Wiens 2003), so the chance of any wrong one is below 1 - level.

    Args:
        confidences: (N,) from 0 to 1.
        scores: (N,) from 0 to 1.
        images: (N,) what tells images apart.
        target: Wanted accuracy, above 0 and below 1.
        num_asked: Of how many questions these are the answers; None: of as many.
        level: How sure it shall be.

    Raises:
        ValueError: There are no answers, or not as many of each.
    """
    sure, right, image = _arrays(confidences, scores, images)
    shares = np.arange(_NUM_STEPS - 1, -1, -1) / _NUM_STEPS
    steps = np.unique(_floor(np.quantile(sure, shares, method="higher")))[::-1]
    alike = _alikeness(right, image)
    share = carried = (1 - level) / len(steps)
    best = None
    for step in steps:
        chosen = sure >= step
        if _p_value(right[chosen], image[chosen], target, alike) <= carried:
            best, carried = float(step), carried + share
        else:
            carried = share
    kept = np.zeros_like(sure, dtype=bool) if best is None else sure >= best
    return Threshold(
        target=target, level=level, confidence=best, num_answers=int(kept.sum()),
        accuracy=float(right[kept].mean()) if kept.any() else None,
        coverage=float(kept.sum() / (num_asked or len(sure))),
    )  # fmt: skip


def _floor(values: Floats) -> Floats:
    """Cut numbers to digits that people copy."""
    return np.asarray(np.floor(values * 10**_NUM_DIGITS) / 10**_NUM_DIGITS)


def _arrays(
    confidences: ArrayLike, scores: ArrayLike, images: Sequence[Any] | NDArray[Any]
) -> tuple[Floats, Floats, NDArray[np.intp]]:
    sure, right = np.asarray(confidences, np.float64), np.asarray(scores, np.float64)
    if not sure.shape == right.shape == (len(images),) or not len(sure):
        raise ValueError(
            f"{sure.shape} confidences, {right.shape} scores and {len(images)} images; expected as many of "
            "each, and at least one"
        )
    places: dict[Any, int] = {}
    return sure, right, np.array([places.setdefault(image, len(places)) for image in images])


def _bin(sure: Floats, num_bins: int) -> NDArray[np.intp]:
    """Put answers into bins of equal numbers, those of the same confidence into one: (N,)."""
    edges = np.unique(np.quantile(sure, np.arange(1, num_bins) / num_bins))
    return np.asarray(np.unique(np.searchsorted(edges, sure, side="right"), return_inverse=True)[1])


def _describe(
    sure: Floats, right: Floats, image: NDArray[np.intp], chosen: NDArray[np.bool_], num_resamples: int
) -> Bin:
    return Bin(
        low=float(sure[chosen].min()),
        high=float(sure[chosen].max()),
        confidence=float(sure[chosen].mean()),
        accuracy=mean_interval(right[chosen], image[chosen].tolist(), num_resamples=num_resamples),
    )


def _noise(gaps: Floats, sizes: Floats, num_resamples: int, seed: int) -> Floats:
    """Return how chance moves the distances of bins (R, B), of sums (G, B) of images of some sizes."""
    rng = np.random.default_rng(seed)
    num_images = len(sizes)
    found: list[Floats] = []

    def count(drawn: NDArray[np.int64]) -> Floats:
        return np.bincount(drawn, minlength=num_images).astype(np.float64)

    for start in range(0, num_resamples, _BATCH):
        number = min(_BATCH, num_resamples - start)
        drawn = np.stack([count(rng.integers(num_images, size=num_images)) for _ in range(number)])
        found.append(drawn @ gaps / (drawn @ sizes)[:, None])
    # Images that are drawn scatter less than those they are drawn from.
    wider = np.sqrt(num_images / max(1, num_images - 1))
    return np.asarray((np.concatenate(found) - gaps.sum(axis=0) / sizes.sum()) * wider)


def _unseen(
    right: Floats, image: NDArray[np.intp], place: NDArray[np.intp], num_resamples: int, seed: int
) -> Floats:
    """Return how distances of bins (R, B) may be others where all answers are right, or all are wrong.

    A bootstrap cannot show that some images are not so. Their share has the distribution that is left of a
    uniform one when that many images were all alike.
    """
    rng = np.random.default_rng(seed + 1)
    found = np.zeros((num_resamples, place.max() + 1))
    for number in range(found.shape[1]):
        scores, images = right[place == number], image[place == number]
        if scores[0] in (0, 1) and np.ptp(scores) == 0:
            share = len(scores) / len(right) * (1 if scores[0] else -1)
            found[:, number] = share * rng.beta(1, len(np.unique(images)) + 1, num_resamples)
    return found


def _without_bias(found: Floats, noise: Floats, others: Floats) -> tuple[float, float, float]:
    """Return the error without what chance adds to it, and both ends of its interval.

    Args:
        found: (B,) distances of bins.
        noise: (R, B) how chance moves them.
        others: (R, B) what they may be, beyond what that shows.
    """
    plain = float(np.abs(found).sum())
    low, error, high = (plain * _scale(found, noise, share) for share in (1 - ALPHA / 2, 0.5, ALPHA / 2))
    # Distances that are large keep their signs, whatever chance does: it does not add to their sum.
    high = max(high, plain - float(np.quantile(noise @ np.sign(found), ALPHA / 2)))
    least, most = np.quantile(np.abs(others).sum(axis=1), (ALPHA / 2, 1 - ALPHA / 2))
    return error, min(low, float(least)), min(1.0, max(high, float(most)))


def _scale(found: Floats, noise: Floats, share: float) -> float:
    """Return the factor of the distances (B,) with which that share of cases shows less than was found."""
    plain = np.abs(found).sum()

    def excess(factor: float) -> float:
        return float(np.quantile(np.abs(factor * found + noise).sum(axis=1), share) - plain)

    if not plain or excess(0.0) >= 0:
        return 0.0
    return _MOST_SCALE if excess(_MOST_SCALE) <= 0 else float(optimize.brentq(excess, 0.0, _MOST_SCALE))


def _alikeness(right: Floats, image: NDArray[np.intp]) -> float:
    """Return the correlation of scores of one image, 0 to 1; where all scores are alike nothing tells: 1."""
    worth, size = _design_effect(right, image)
    if worth is None:
        return 1.0
    return float(np.clip((worth - 1) / (size - 1), 0, 1)) if size > 1 else 0.0


def _design_effect(right: Floats, image: NDArray[np.intp]) -> tuple[float | None, float]:
    """Return by what factor common images raise the variance of the mean, and how many answers share one."""
    _, place, sizes = np.unique(image, return_inverse=True, return_counts=True)
    size = float((sizes**2).sum() / sizes.sum())
    variance = right.var()
    if variance == 0 or len(sizes) < 2:
        return None, size
    sums = np.bincount(place, right - right.mean())
    clustered = len(sizes) / (len(sizes) - 1) * (sums**2).sum() / len(right)
    return float(clustered / variance), size


def _p_value(right: Floats, image: NDArray[np.intp], target: float, alike: float) -> float:
    """Return how often answers that are right just as often as wanted would look so good."""
    own, size = _design_effect(right, image)
    worth = len(right) / max(1.0, own or 1.0, 1 + (size - 1) * alike)
    num_right = worth * right.mean()
    if num_right <= 0:
        return 1.0
    return float(stats.beta.cdf(target, num_right, worth - num_right + 1))
