"""Several draws of an answer: which one most of them give, and what the best of some is worth."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from vlmray.metrics.draws import majority, normal_form, pass_at_k, powers_to


@pytest.mark.parametrize("number", range(1, 8))
def test_the_best_of_k_is_the_mean_over_all_choices_of_k(number: int) -> None:
    rng = random.Random(number)
    for _ in range(20):
        scores = [rng.choice([0.0, 1.0, 0.5, rng.random()]) for _ in range(number)]
        for k in range(1, number + 1):
            best = [max(chosen) for chosen in itertools.combinations(scores, k)]
            assert pass_at_k(scores, k) == pytest.approx(math.fsum(best) / len(best), abs=1e-12)


@pytest.mark.parametrize("number", [1, 2, 5, 64])
def test_right_or_wrong_it_is_the_binomial_formula(number: int) -> None:
    for num_right, k in itertools.product(range(number + 1), range(1, number + 1)):
        scores = [1.0] * num_right + [0.0] * (number - num_right)
        found = pass_at_k(scores, k)
        assert found == pytest.approx(1 - math.comb(number - num_right, k) / math.comb(number, k), abs=1e-12)
        if num_right in (0, number):
            assert found == (num_right > 0)  # to the last digit: an interval tells all alike from nearly so


def test_it_is_told_of_each_question_and_grows_with_k() -> None:
    scores = np.random.default_rng(0).random((30, 9))
    found = np.array([pass_at_k(scores, k) for k in range(1, 10)])
    assert found.shape == (9, 30)
    assert (np.diff(found, axis=0) > 0).all()
    assert found[0] == pytest.approx(scores.mean(axis=1))
    assert found[-1].tolist() == scores.max(axis=1).tolist()
    assert pass_at_k(scores[:, ::-1], 4) == pytest.approx(found[3])


@pytest.mark.parametrize("k", [0, 4, -1])
def test_more_than_were_drawn_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"the best of {k} of 3 draws; expected 1 to 3"):
        pass_at_k([0, 1, 0], k)


@pytest.mark.parametrize("number", range(1, 65))
def test_tries_go_from_one_to_all(number: int) -> None:
    tries = powers_to(number)
    assert tries == sorted(set(tries))
    assert (tries[0], tries[-1]) == (1, number)
    assert len(tries) <= 7


ALIKE = [
    ["Blue", "blue", " blue.", "“Blue”", "BLUE!", "**blue**", "(blue)"],
    ["1000", "1,000", "1000.0", "1e3", "+1000", "1000.", "$1,000", "'1000'", "(1,000.00)"],
    ["0", "-0", "0.0", "0 %", "00"],
    [".5", "0.5", "'.5'", "0.50", "50e-2"],
    ["-5", "−5", "-5.0"],
    ["New York", "new   york", "New\nYork"],
    ['{"a": 1, "b": ["X"]}', '{"b":["x"],"a":1.0}'],
    ["[1, 2]", "[1.0,2]"],
    ["C++"],
    ["C#"],
    ["C"],
    ["?"],
    [""],
    ["5 apples"],
    ["A bar"],
    ['{"a": 1'],
]


def test_answers_that_say_the_same_are_one_and_others_are_not() -> None:
    forms = [{normal_form(text) for text in texts} for texts in ALIKE]
    assert [len(form) for form in forms] == [1] * len(forms)
    assert len(set.union(*forms)) == len(forms)


def test_the_majority_is_the_largest_group_and_of_equal_ones_the_first() -> None:
    rng = random.Random(0)
    for _ in range(500):
        groups = rng.sample(ALIKE, 3)
        said = [rng.randrange(3) for _ in range(rng.randint(1, 9))]
        place, agreement = majority([rng.choice(groups[group]) for group in said])
        counts = [said.count(group) for group in range(3)]
        assert counts[said[place]] == max(counts)
        assert agreement == max(counts) / len(said)
        first = min(said.index(group) for group in range(3) if counts[group] == max(counts))
        assert place == first


def test_no_answers_have_no_majority() -> None:
    with pytest.raises(ValueError, match="empty"):
        majority([])
