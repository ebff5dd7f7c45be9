"""Intervals and tests for scores whose samples share images; measures nothing and draws nothing.

    scores by sample, image of each sample -> mean_interval     -> Interval
    scores of two models                   -> paired_difference -> Difference
    and a margin                           -> not_worse         -> MarginTest
    a difference found in a pilot          -> detectable, num_samples_for

Questions about one chart stand and fall together, so what is drawn at random is the image, with all its
questions: a bootstrap over rows would give intervals that are too narrow.

Shapes: `N` samples, `G` images.
"""

from __future__ import annotations

import math
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
    """Paired permutation test over images: how often chance alone would differ this much (mid-p)."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class MarginTest:
    """Whether one model is worse than another by less than a margin (non-inferiority)."""

    margin: float
    """How much worse is tolerated, above 0."""

    low: float
    """One-sided 95 % bound of the difference: no worse than that."""

    p_value: float
    """How often chance alone would look so good if the model were worse by the margin."""


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
        means = _bootstrap(sums, counts, num_resamples, seed)
        low, high = _percentiles(means)
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
        means = _bootstrap(sums, counts, num_resamples, seed)
        low, high = _percentiles(means)
        # A bootstrap's error is that of the images drawn, which scatter less than those they are drawn from.
        error = means.std(ddof=1) * math.sqrt(len(sums) / (len(sums) - 1))
        smallest = float(_num_errors(two_sided=True) * error)
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


def not_worse(
    first: ArrayLike,
    second: ArrayLike,
    images: Sequence[Any],
    margin: float,
    *,
    num_resamples: int = _NUM_RESAMPLES,
    seed: int = 0,
) -> MarginTest:
    """Test whether a model is worse than another by less than a margin, one-sided, by bootstrap over images.

    Where no image scores lower the bootstrap cannot tell how many others would; the test is then the exact
    binomial one of an image losing all its answers.

    Args:
        first: (N,) scores of the model compared with.
        second: (N,) scores of the other.
        images: (N,) what tells images apart.
        margin: How much worse is tolerated, above 0 and below 1.
        num_resamples: Draws of the bootstrap.
        seed: Seeds them.

    Raises:
        ValueError: There are no scores, or not as many of both.
    """
    changes = _values(second) - _values(first)
    sums, counts = _by_image(changes, images)
    if not np.any(sums < 0):
        num_images = len(sums)
        return MarginTest(
            margin=margin, low=ALPHA ** (1 / num_images) - 1, p_value=(1 - margin) ** num_images
        )
    if len(sums) == 1:
        return MarginTest(margin=margin, low=-1.0, p_value=1.0)  # one image says nothing about others
    means = _bootstrap(sums, counts, num_resamples, seed)
    p_value = (1 + np.count_nonzero(means <= -margin)) / (1 + num_resamples)
    return MarginTest(margin=margin, low=float(np.quantile(means, ALPHA)), p_value=float(p_value))


def detectable(pilot: Difference, num_samples: int) -> float | None:
    """Return the difference that so many samples like those of a pilot show in 4 of 5 cases."""
    return None if pilot.smallest is None else pilot.smallest * math.sqrt(pilot.num_samples / num_samples)


def num_samples_for(pilot: Difference, difference: float, *, two_sided: bool = True) -> int | None:
    """Return how many samples like those of a pilot show a difference in 4 of 5 cases.

    Args:
        pilot: What was found in it.
        difference: What is to be shown, above 0; one-sided: the margin, of models that are equal.
        two_sided: Whether either of the two may be better.
    """
    if pilot.smallest is None:
        return None
    share = _num_errors(two_sided=two_sided) / _num_errors(two_sided=True)
    return math.ceil(pilot.num_samples * (share * pilot.smallest / difference) ** 2)


def _num_errors(*, two_sided: bool) -> float:
    """Return how many standard errors away a difference is found in 4 of 5 cases."""
    return float(stats.norm.ppf(1 - ALPHA / (2 if two_sided else 1)) + stats.norm.ppf(_POWER))


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
) -> NDArray[np.float64]:
    """Return the means of resampled images, (num_resamples,)."""

    def mean(sums: Any, counts: Any, axis: int = -1) -> Any:
        return sums.sum(axis=axis) / counts.sum(axis=axis)

    result = stats.bootstrap(
        (sums, counts), mean, paired=True, vectorized=True, n_resamples=num_resamples, batch=_BATCH,
        method="percentile", rng=np.random.default_rng(seed),
    )  # fmt: skip
    found: NDArray[np.float64] = result.bootstrap_distribution
    return found


def _percentiles(means: NDArray[np.float64]) -> tuple[float, float]:
    """Return both ends of the percentile interval."""
    low, high = np.quantile(means, (ALPHA / 2, 1 - ALPHA / 2))
    return float(low), float(high)


def _flip_signs(sums: NDArray[np.float64], num_resamples: int, seed: int) -> float:
    """Return the p-value of the difference when each image might as well have had the other sign.

    Images that change by as much are flipped together: how many of them are positive is binomial. All cases
    are gone through where these are few, else some are drawn. A case as likely as the one found counts half
    (mid-p): counted whole, two equal models were called different in 2 to 4 of 100 runs, and not in 5.
    """
    changed = np.abs(sums[sums != 0])  # the others are the same either way
    sizes, alike = np.unique(changed, return_counts=True)
    if np.log1p(alike).sum() <= math.log(num_resamples):
        grid = np.meshgrid(*map(np.arange, alike + 1), indexing="ij")
        positive = np.stack(grid, axis=-1).reshape(-1, len(alike))
        chances = stats.binom.pmf(positive, alike, 0.5).prod(axis=-1)
        totals = (2 * positive - alike) @ sizes
    else:
        rng = np.random.default_rng(seed)
        batches = (min(_BATCH, num_resamples - start) for start in range(0, num_resamples, _BATCH))
        drawn = [(2 * rng.binomial(alike, 0.5, (size, len(alike))) - alike) @ sizes for size in batches]
        totals = np.concatenate([[sums.sum()], *drawn])
        chances = np.full(len(totals), 1 / len(totals))
    beyond = np.abs(totals) - abs(sums.sum())
    is_equal = np.isclose(beyond, 0, atol=1e-9)
    return float(chances[(beyond > 0) & ~is_equal].sum() + chances[is_equal].sum() / 2)
