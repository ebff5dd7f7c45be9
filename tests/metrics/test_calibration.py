"""Calibration on simulated models of which the truth is known, with many questions about an image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm

from vlmray.metrics.calibration import calibrate, find_threshold, risk_coverage

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Simulated:
    """A model whose answers are right with a known probability; those about an image have luck in common."""

    num_images: int = 150
    most_questions: int = 6
    overconfidence: float = 0.0
    """How much surer it is than right, at most."""

    common_luck: float = 0.8
    certain: float = 1.5
    """How sure it is: the middle of its log-odds."""

    flat: float | None = None
    """Probability of every answer, whatever it is sure of."""

    def draw(self, seed: int, num_images: int | None = None) -> tuple[Floats, Floats, Floats, list[int]]:
        """Confidence, score, true probability and image of each answer."""
        rng = np.random.default_rng(seed)
        sizes = rng.integers(1, self.most_questions + 1, num_images or self.num_images)
        image = np.repeat(np.arange(len(sizes)), sizes)
        each, common = rng.normal(size=(2, len(image))), rng.normal(size=(2, len(sizes)))[:, image]
        sure = 1 / (1 + np.exp(-self.certain - 1.4 * (each[0] + common[0])))
        chance = np.clip(sure - self.overconfidence * 4 * sure * (1 - sure), 0, 1)
        if self.flat is not None:
            chance = np.full_like(sure, self.flat)
        luck = np.sqrt(self.common_luck) * common[1] + np.sqrt(1 - self.common_luck) * each[1]
        return sure, (luck < norm.ppf(chance)).astype(float), chance, image.tolist()


MODELS = {
    "calibrated": Simulated(),
    "calibrated, one question each": Simulated(most_questions=1, num_images=300),
    "calibrated and certain": Simulated(certain=3.5),
    "too sure": Simulated(overconfidence=0.2),
    "a little too sure": Simulated(overconfidence=0.05, num_images=300),
    "not sure enough": Simulated(overconfidence=-0.15, common_luck=0.0),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_interval_holds_the_true_error_at_its_level(name: str) -> None:
    model, num_runs = MODELS[name], 120
    everything = model.draw(10**6, 40_000)
    truth = abs(float((everything[0] - everything[2]).mean()))  # all gaps have one sign: bins do not matter
    found = [
        calibrate(*draw[:2], draw[3], num_resamples=300)
        for draw in (model.draw(seed) for seed in range(num_runs))
    ]
    held = np.mean([each.low - 1e-3 <= truth <= each.high + 1e-3 for each in found])
    assert held >= 0.95 - 2.5 * np.sqrt(0.95 * 0.05 / num_runs)
    assert abs(np.mean([each.error for each in found]) - truth) < 0.03
    assert np.mean([each.plain_error for each in found]) > truth
    width = np.mean([each.high - each.low for each in found])
    assert width < 0.12  # an interval of everything would hold the truth, too


def test_a_model_that_is_too_sure_is_found_out() -> None:
    assert calibrate(*MODELS["too sure"].draw(1)[:2], MODELS["too sure"].draw(1)[3]).low > 0.03


def test_the_same_questions_again_say_nothing_new() -> None:
    sure, right, _, image = MODELS["a little too sure"].draw(3)
    once = calibrate(sure, right, image)
    thrice = calibrate(np.tile(sure, 3), np.tile(right, 3), image * 3)
    assert (thrice.low, thrice.error, thrice.high) == pytest.approx((once.low, once.error, once.high))
    apart = calibrate(np.tile(sure, 3), np.tile(right, 3), [*range(3 * len(sure))])
    assert apart.high - apart.low < 0.8 * (once.high - once.low)
    targets = [find_threshold(sure, right, image, target) for target in (0.7, 0.8, 0.9)]
    assert any(each.confidence for each in targets)
    for each in targets:
        again = find_threshold(np.tile(sure, 3), np.tile(right, 3), image * 3, each.target)
        assert (again.confidence, again.coverage) == (each.confidence, each.coverage)


def test_bins_have_like_numbers_and_keep_together_what_is_alike() -> None:
    rng = np.random.default_rng(0)
    sure = np.concatenate([rng.uniform(size=500), np.ones(500)])
    found = calibrate(sure, rng.integers(0, 2, 1000), [*range(1000)])
    sizes = [each.accuracy.num_samples for each in found.bins]
    assert sum(sizes) == 1000
    assert sizes[-1] == 500
    assert all(90 <= size <= 110 for size in sizes[:-1])
    edges = [bound for each in found.bins for bound in (each.low, each.high)]
    assert edges == sorted(edges)


def test_certain_and_right_is_calibrated_and_certain_and_wrong_is_not() -> None:
    ones, images = np.ones(40), [*range(40)]
    assert calibrate(ones, ones, images).error == 0
    assert 0.05 < calibrate(ones, ones, images).high < 0.1  # 40 others may show one that is wrong
    assert 0.9 < calibrate(ones, 1 - ones, images).low < 0.95
    assert calibrate([0.5], [1.0], ["a"]).accuracy.num_images == 1


def test_risk_against_coverage() -> None:
    found = risk_coverage([0.9, 0.5, 0.5, 0.8], [1, 0, 1, 0], num_asked=8)
    assert found.tolist() == [[1 / 8, 0.0], [2 / 8, 0.5], [4 / 8, 0.5]]


@pytest.mark.parametrize(
    ("model", "target"),
    [
        (Simulated(), 0.9),
        (Simulated(num_images=60), 0.8),
        (Simulated(overconfidence=0.2, most_questions=12), 0.8),
        (Simulated(overconfidence=0.1, num_images=400, common_luck=0.95), 0.95),
        (Simulated(most_questions=1, num_images=500, common_luck=0.0), 0.95),
        (Simulated(certain=4.0, most_questions=10), 0.97),
        # every threshold is wrong: nothing but chance leads to one
        (Simulated(flat=0.895, num_images=200), 0.9),
        (Simulated(flat=0.945, num_images=100, most_questions=20, common_luck=0.5), 0.95),
        (Simulated(flat=0.975, num_images=200, most_questions=1), 0.98),
        (Simulated(flat=0.895, num_images=60, most_questions=12, common_luck=0.95), 0.9),
    ],
)
def test_the_threshold_keeps_its_promise_on_fresh_data(model: Simulated, target: float) -> None:
    num_runs = 200
    sure, _, chance, _ = model.draw(10**6, 40_000)
    order = np.argsort(-sure)
    accuracy = np.cumsum(chance[order]) / np.arange(1, len(order) + 1)
    broken = 0
    for seed in range(num_runs):
        own, right, _, image = model.draw(seed)
        found = find_threshold(own, right, image, target)
        if found.confidence is not None:
            num_fresh = int((sure >= found.confidence).sum())
            broken += accuracy[num_fresh - 1] < target
            assert found.num_answers == (own >= found.confidence).sum()
            assert found.coverage == found.num_answers / len(own)
    assert broken / num_runs <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / num_runs)


def test_the_threshold_answers_much_of_what_could_be_answered() -> None:
    model = Simulated(num_images=600, common_luck=0.3)
    sure, _, chance, _ = model.draw(10**6, 40_000)
    accuracy = np.cumsum(chance[np.argsort(-sure)]) / np.arange(1, len(sure) + 1)
    possible = np.nonzero(accuracy >= 0.9)[0][-1] / len(sure)
    found = [
        find_threshold(*draw[:2], draw[3], 0.9).coverage for draw in (model.draw(seed) for seed in range(20))
    ]
    assert 0.5 < possible < 0.95
    assert np.mean(found) > 0.75 * possible


def test_too_few_answers_promise_nothing() -> None:
    found = find_threshold(np.ones(40), np.ones(40), [*range(40)], 0.95)
    assert (found.confidence, found.num_answers, found.coverage, found.accuracy) == (None, 0, 0.0, None)
    assert find_threshold(np.ones(80), np.ones(80), [*range(80)], 0.95).confidence == 1.0
    about_one = find_threshold(np.ones(80), np.ones(80), [0] * 80, 0.95)
    assert about_one.confidence is None


def test_answers_that_failed_are_not_covered() -> None:
    found = find_threshold(np.ones(300), np.ones(300), [*range(300)], 0.9, num_asked=400)
    assert found.coverage == 0.75


def test_unlike_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2,\) confidences, \(1,\) scores and 2 images"):
        calibrate([0.5, 0.6], [1.0], ["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        find_threshold([], [], [], 0.9)
