"""Intervals and tests for scores whose samples share images; measures nothing and draws nothing.

    scores by sample, image of each sample -> mean_interval     -> Interval
    scores of two models                   -> paired_difference -> Difference

Questions about one chart stand and fall together, so what is drawn at random is the image, with all its
questions: a bootstrap over rows would give intervals that are too narrow.

Shapes: `N` samples, `G` images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests

CONFIDENCE = 0.95
ALPHA = 1 - CONFIDENCE
_POWER = 0.8
_NUM_RESAMPLES = 9_999
_BATCH = 256  # resamples drawn at a time: G x 256 numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean score and its 95 % interval, 0 to 1."""

    mean: float
    low: float
    high: float
    num_samples: int
    num_images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How much one model scores above another on the same samples."""

    mean: float
    """Second model minus first, -1 to 1."""

    low: float
    high: float
    p_value: float
    """Paired permutation test over images: how often chance alone would differ this much."""

    mcnemar_p: float | None
    """McNemar's exact test over samples, where all scores are 0 or 1; it takes questions about one image for
    independent."""

    num_gained: int
    """Samples that score higher with the second model."""

    num_lost: int
    smallest: float | None
    """Difference that a sample like this one shows in 4 of 5 cases, where there is one; None where no image
    differs."""

    num_samples: int
    num_images: int


def mean_interval(
    scores: ArrayLike, images: Sequence[Any], *, num_resamples: int = _NUM_RESAMPLES, seed: int = 0
) -> Interval:
    """Return the mean and its interval by bootstrap over images.

    Scores that are all 0 or all 1 leave the bootstrap no width; the interval is then the exact binomial
    one (Clopper and Pearson) of as many trials as there are images.

    Args:
        scores: (N,) from 0 to 1.
        images: (N,) what tells images apart.
        num_resamples: Draws of the bootstrap.
        seed: Seeds them.

    Raises:
        ValueError: There are no scores.
    """
    values = _values(scores)
    sums, counts = _by_image(values, images)
    mean = float(values.mean())
    if len(sums) == 1 or np.ptp(values) == 0:
        exact = stats.binomtest(round(mean * len(sums)), len(sums)).proportion_ci(CONFIDENCE)
        low, high = (0.0, 1.0) if 0 < mean < 1 else (float(exact.low), float(exact.high))
    else:
        low, high, _ = _bootstrap(sums, counts, num_resamples, seed)
    return Interval(mean=mean, low=low, high=high, num_samples=len(values), num_images=len(sums))


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    images: Sequence[Any],
    *,
    num_resamples: int = _NUM_RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Compare two models that answered the same samples.

    The interval is a bootstrap over images, the test flips the sign of each image's difference, and the
    smallest difference is (z(0.975) + z(0.8)) standard errors.

    Args:
        first: (N,) scores of the model compared with.
        second: (N,) scores of the other.
        images: (N,) what tells images apart.
        num_resamples: Draws of the bootstrap and of the test.
        seed: Seeds them.

    Raises:
        ValueError: There are no scores, or not as many of both.
    """
    before, after = _values(first), _values(second)
    changes = after - before
    sums, counts = _by_image(changes, images)
    low, high, smallest, p_value = 0.0, 0.0, None, 1.0
    if np.any(sums) and len(sums) > 1:
        low, high, error = _bootstrap(sums, counts, num_resamples, seed)
        smallest = float((stats.norm.ppf(1 - ALPHA / 2) + stats.norm.ppf(_POWER)) * error)
        p_value = _flip_signs(sums, num_resamples, seed)
    elif np.any(sums):
        low, high = -1.0, 1.0  # one image says nothing about others
    num_gained, num_lost = int((changes > 0).sum()), int((changes < 0).sum())
    mcnemar = None
    if np.isin(np.concatenate([before, after]), (0.0, 1.0)).all():
        num_changed = num_gained + num_lost
        mcnemar = float(stats.binomtest(num_gained, num_changed).pvalue) if num_changed else 1.0
    return Difference(
        mean=float(changes.mean()), low=low, high=high, p_value=p_value, mcnemar_p=mcnemar,
        num_gained=num_gained, num_lost=num_lost, smallest=smallest, num_samples=len(changes),
        num_images=len(sums),
    )  # fmt: skip


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm 1979): the chance of any false alarm stays below the level."""
    return [float(p) for p in multipletests(p_values, ALPHA, method="holm")[1]] if p_values else []


def _values(scores: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"scores of shape {values.shape}; expected one for each of at least one sample")
    return values


def _by_image(
    values: NDArray[np.float64], images: Sequence[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return sum and number of the values of each image, both (G,)."""
    if len(values) != len(images):
        raise ValueError(f"{len(values)} scores and {len(images)} images; expected as many")
    places: dict[Any, int] = {}
    index = np.array([places.setdefault(image, len(places)) for image in images])
    sums, counts = np.zeros(len(places)), np.zeros(len(places))
    np.add.at(sums, index, values)
    np.add.at(counts, index, 1)
    return sums, counts


def _bootstrap(
    sums: NDArray[np.float64], counts: NDArray[np.float64], num_resamples: int, seed: int
) -> tuple[float, float, float]:
    """Return both ends of the percentile interval of the mean, and its standard error."""

    def mean(sums: Any, counts: Any, axis: int = -1) -> Any:
        return sums.sum(axis=axis) / counts.sum(axis=axis)

    result = stats.bootstrap(
        (sums, counts), mean, paired=True, vectorized=True, n_resamples=num_resamples, batch=_BATCH,
        confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(seed),
    )  # fmt: skip
    interval = result.confidence_interval
    return float(interval.low), float(interval.high), float(result.standard_error)


def _flip_signs(sums: NDArray[np.float64], num_resamples: int, seed: int) -> float:
    """Return the p-value of the difference when each image might as well have had the other sign."""
    changed = sums[sums != 0]  # the others are the same either way
    if len(changed) == 1:
        return 1.0  # as large either way
    result = stats.permutation_test(
        (changed,), lambda values, axis=-1: values.sum(axis=axis), permutation_type="samples",
        vectorized=True, n_resamples=num_resamples, batch=_BATCH, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(result.pvalue)
