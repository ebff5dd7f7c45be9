"""Intervals and tests: right on cases worked out by hand, and right as often as they say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from vlmray.metrics.significance import (
    detectable,
    holm,
    mean_interval,
    not_worse,
    num_samples_for,
    paired_difference,
)


def test_without_shared_images_the_interval_is_that_of_a_proportion() -> None:
    rng = np.random.default_rng(0)
    scores = (rng.random(2000) < 0.8).astype(float)
    found = mean_interval(scores, range(2000))
    error = 1.96 * np.sqrt(0.8 * 0.2 / 2000)
    assert found.mean == scores.mean()
    assert found.low == pytest.approx(found.mean - error, abs=0.003)
    assert found.high == pytest.approx(found.mean + error, abs=0.003)
    assert (found.num_samples, found.num_images) == (2000, 2000)


def test_questions_of_one_image_count_once() -> None:
    """Every question asked four times about its image tells no more than once."""
    rng = np.random.default_rng(1)
    scores = (rng.random(300) < 0.6).astype(float)
    once = mean_interval(scores, range(300))
    four = mean_interval(np.repeat(scores, 4), np.repeat(np.arange(300), 4).tolist())
    assert four.high - four.low == pytest.approx(once.high - once.low, rel=0.05)
    blind = mean_interval(np.repeat(scores, 4), range(1200))
    assert blind.high - blind.low == pytest.approx((once.high - once.low) / 2, rel=0.1)


@pytest.mark.parametrize(("score", "low", "high"), [(1.0, 0.6915, 1.0), (0.0, 0.0, 0.3085)])
def test_all_alike_is_not_certain(score: float, low: float, high: float) -> None:
    found = mean_interval([score] * 10, range(10))
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-3)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Of 400 samples of 150 images with one to four questions, 95 % of the intervals hold the true mean."""
    rng = np.random.default_rng(2)
    num_right = 0
    for seed in range(400):
        counts = rng.integers(1, 5, 150)
        skill = rng.beta(4, 2, 150)  # questions of one chart are alike
        images = np.repeat(np.arange(150), counts)
        scores = (rng.random(len(images)) < skill[images]).astype(float)
        found = mean_interval(scores, images.tolist(), num_resamples=500, seed=seed)
        num_right += found.low <= 4 / 6 <= found.high
    assert 0.91 <= num_right / 400 <= 0.98


def test_a_difference_is_paired() -> None:
    first = [0.0] * 30 + [1.0] * 70
    second = [1.0] * 20 + [0.0] * 10 + [1.0] * 65 + [0.0] * 5
    found = paired_difference(first, second, range(100))
    assert found.mean == pytest.approx(0.15)
    assert (found.num_gained, found.num_lost) == (20, 5)
    error = np.std(np.subtract(second, first)) / 10
    assert (found.low, found.high) == pytest.approx((0.15 - 1.96 * error, 0.15 + 1.96 * error), abs=0.02)
    assert found.smallest == pytest.approx(2.8016 * error, rel=0.05)
    table = [[65, 5], [20, 10]]
    assert found.mcnemar_p == pytest.approx(mcnemar(table, exact=True).pvalue)
    mid_p = stats.binomtest(20, 25).pvalue - stats.binom.pmf(20, 25, 0.5)
    assert found.p_value == pytest.approx(mid_p)


def test_equal_answers_are_no_difference() -> None:
    found = paired_difference([0.0, 1.0, 0.5], [0.0, 1.0, 0.5], "abc")
    assert (found.mean, found.low, found.high, found.p_value, found.smallest) == (0, 0, 0, 1, None)
    assert found.mcnemar_p is None  # 0.5 is neither right nor wrong


def test_one_changed_image_is_no_evidence() -> None:
    found = paired_difference([0.0] * 20, [1.0] + [0.0] * 19, range(20))
    assert (found.p_value, found.mcnemar_p, found.num_gained) == (0.5, 1.0, 1)
    assert found.low == 0 < found.high
    alone = paired_difference([0.0], [1.0], ["only"])
    assert (alone.low, alone.high, alone.p_value) == (-1.0, 1.0, 1.0)


def test_what_is_lost_on_an_image_makes_up_for_what_is_gained_on_it() -> None:
    found = paired_difference([0.0, 1.0] * 8, [1.0, 0.0] * 8, [index // 2 for index in range(16)])
    assert (found.mean, found.p_value, found.num_gained, found.num_lost) == (0, 1, 8, 8)


def test_drawn_cases_tell_what_all_of_them_tell() -> None:
    rng = np.random.default_rng(7)
    images = np.repeat(np.arange(40), 2).tolist()
    first, second = rng.random(80) < 0.5, rng.random(80) < 0.65
    counted = paired_difference(first, second, images, num_resamples=2_000)
    # Scores a little apart: no two images are alike, and there are too many cases to go through.
    apart = second + 1e-6 * rng.random(80)
    drawn = paired_difference(first, apart, images, num_resamples=20_000)
    assert drawn.p_value == pytest.approx(counted.p_value, abs=0.03)
    assert (drawn.low, drawn.high) == pytest.approx((counted.low, counted.high), abs=0.02)


@pytest.mark.parametrize(("num_images", "right"), [(100, 0.67), (50, 0.8)])
def test_equal_models_are_called_different_as_often_as_is_said(num_images: int, right: float) -> None:
    """With few changed answers too, where an exact test says so in 2 or 3 of 100 cases and not in 5."""
    rng = np.random.default_rng(8)
    answers = rng.random((2, 3000, num_images)) < rng.beta(5 * right, 5 - 5 * right, (3000, num_images))
    images = range(num_images)
    found = [
        paired_difference(*each, images, num_resamples=100).p_value for each in zip(*answers, strict=True)
    ]
    assert 0.035 < np.mean(np.less(found, 0.05)) < 0.065


def test_swapping_the_models_turns_the_sign() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.random(80), rng.random(80)
    images = [index // 3 for index in range(80)]
    one, other = paired_difference(first, second, images), paired_difference(second, first, images)
    assert one.mean == pytest.approx(-other.mean)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=0.005)
    assert one.p_value == pytest.approx(other.p_value, abs=0.02)
    assert (one.num_gained, one.num_lost) == (other.num_lost, other.num_gained)


def test_holm() -> None:
    p_values = [0.01, 0.04, 0.03]
    assert holm(p_values) == pytest.approx([0.03, 0.06, 0.06])
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])
    assert holm([]) == []


@pytest.mark.parametrize(("scores", "images"), [([], []), ([1.0], []), ([[1.0]], [0])])
def test_what_cannot_be_compared_is_refused(scores: list[float], images: list[int]) -> None:
    with pytest.raises(ValueError, match=r"scores|images"):
        mean_interval(scores, images)


# Not worse by more than a margin


def test_the_bound_is_that_of_a_one_sided_test() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.random(400) < 0.7, rng.random(400) < 0.7
    changes = second.astype(float) - first.astype(float)
    error = changes.std(ddof=1) / 20
    found = not_worse(first, second, range(400), 0.05)
    assert found.low == pytest.approx(changes.mean() - 1.645 * error, abs=0.15 * error)
    expected = stats.norm.sf((changes.mean() + 0.05) / error)
    assert found.p_value == pytest.approx(expected, rel=0.25)


def test_bound_and_p_value_agree() -> None:
    rng = np.random.default_rng(4)
    images = np.repeat(np.arange(100), 2)
    first, second = rng.random(200) < 0.7, rng.random(200) < 0.75
    for margin in np.linspace(0.005, 0.2, 40):
        found = not_worse(first, second, images, margin)
        assert (found.p_value < 0.05) == (found.low > -margin)


def test_a_wider_margin_is_easier_to_keep() -> None:
    first, second = [1.0, 0.0] * 50, [1.0, 0.0] * 48 + [0.0] * 4
    values = [not_worse(first, second, range(100), margin).p_value for margin in (0.01, 0.03, 0.1)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.3
    assert values[-1] < 0.01


def test_no_loss_among_few_images_is_no_proof_of_none_among_many() -> None:
    few, many = (not_worse([1.0] * size, [1.0] * size, range(size), 0.02) for size in (100, 200))
    assert few.p_value == pytest.approx(0.98**100)
    assert few.low < -0.02
    assert many.p_value < 0.05
    assert -0.02 < many.low < 0


def test_one_image_shows_nothing() -> None:
    found = not_worse([1.0, 1.0], [1.0, 0.0], [0, 0], 0.9)
    assert (found.low, found.p_value) == (-1.0, 1.0)


def test_a_model_that_is_worse_by_the_margin_is_seldom_let_pass() -> None:
    rng = np.random.default_rng(5)
    num_passed = 0
    for seed in range(200):
        first = rng.random(200) < 0.8
        second = first & (rng.random(200) >= 0.1 / 0.8)  # loses 0.1
        found = not_worse(first, second, range(200), 0.1, num_resamples=499, seed=seed)
        num_passed += found.p_value < 0.05
    assert 1 <= num_passed <= 22  # of 10 that are expected; beyond these lie 2 of 10,000 cases


def test_four_times_the_samples_show_half_the_difference() -> None:
    rng = np.random.default_rng(6)
    pilot = paired_difference(rng.random(300) < 0.6, rng.random(300) < 0.6, range(300))
    assert pilot.smallest is not None
    assert detectable(pilot, 1200) == pytest.approx(pilot.smallest / 2)
    assert num_samples_for(pilot, pilot.smallest / 2) == 1200
    one_sided = num_samples_for(pilot, pilot.smallest / 2, two_sided=False)
    assert one_sided == pytest.approx(1200 * ((1.6449 + 0.8416) / (1.96 + 0.8416)) ** 2, rel=1e-3)
    same = paired_difference([1.0, 1.0], [1.0, 1.0], [0, 1])
    assert (detectable(same, 100), num_samples_for(same, 0.1)) == (None, None)
