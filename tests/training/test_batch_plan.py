"""Batches: every sample once an epoch, whoever trains it, and the same from wherever a run starts again."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator
from fractions import Fraction

import pytest

from vlmray.training.batch_plan import BatchPlan


def _random_plan(rng: random.Random) -> BatchPlan:
    return BatchPlan(
        num_samples=rng.randint(1, 60),
        batch_size=rng.randint(1, 6),
        world_size=rng.randint(1, 4),
        batches_per_step=rng.randint(1, 12),
        seed=rng.choice([None, 0, 1, 7]),
        lengths=rng.choice([None, rng.choices(range(9), k=60)]),
    )


def _slots(plan: BatchPlan, step: int) -> list[int | None]:
    """Return all workers' slots of one step, in the order in which they are filled."""
    return [
        slot
        for number in range(step * plan.accumulation, (step + 1) * plan.accumulation)
        for rank in range(plan.world_size)
        for slot in plan.batch(rank, number)
    ]


def _steps(plan: BatchPlan, epoch: int) -> Iterator[list[int | None]]:
    return (_slots(plan, epoch * plan.steps_per_epoch + step) for step in range(plan.steps_per_epoch))


def _order(plan: BatchPlan, epoch: int) -> list[int]:
    return [slot for step in _steps(plan, epoch) for slot in step if slot is not None]


def test_every_epoch_trains_every_sample_once() -> None:
    rng = random.Random(0)
    for _ in range(300):
        plan = _random_plan(rng)
        for epoch in (0, 1, rng.randint(2, 50)):
            steps = list(_steps(plan, epoch))
            assert sorted(_order(plan, epoch)) == list(range(plan.num_samples))
            assert sum(map(len, steps)) == plan.batches_per_epoch * plan.world_size * plan.batch_size
            for slots in steps[:-1]:
                assert None not in slots[: plan.samples_per_step]  # the last step alone may be short
            for slots in steps:
                trained = [slot for slot in slots if slot is not None]
                assert slots == trained + [None] * (len(slots) - len(trained))
                assert 0 < len(trained) <= plan.samples_per_step
                assert len(slots) - plan.samples_per_step < plan.world_size * plan.batch_size  # one pass


def test_a_step_trains_the_same_samples_however_it_is_shared() -> None:
    rng = random.Random(1)
    for _ in range(40):
        per_step, num_samples, seed = rng.choice([4, 6, 8, 12]), rng.randint(1, 40), rng.choice([None, 3])
        shares = [
            BatchPlan(
                num_samples=num_samples,
                batch_size=batch,
                world_size=world,
                batches_per_step=per_step // batch,
                seed=seed,
            )
            for batch in range(1, per_step + 1)
            for world in range(1, per_step + 1)  # those that leave some without a batch too
            if per_step % batch == 0
        ]
        assert len(shares) > 5
        assert {plan.samples_per_step for plan in shares} == {per_step}
        assert {plan.steps_per_epoch for plan in shares} == {shares[0].steps_per_epoch}
        for step in range(2 * shares[0].steps_per_epoch):
            trained = [[slot for slot in _slots(plan, step) if slot is not None] for plan in shares]
            assert all(samples == trained[0] for samples in trained)


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    def plan(seed: int | None) -> BatchPlan:
        return BatchPlan(num_samples=50, batch_size=4, world_size=2, batches_per_step=2, seed=seed)

    orders = {(seed, epoch): _order(plan(seed), epoch) for seed in (0, 1, 11) for epoch in (0, 1, 2, 11)}
    assert len(set(map(tuple, orders.values()))) == len(orders)
    for (seed, epoch), order in orders.items():
        assert order != list(range(50))
        assert _order(plan(seed), epoch) == order  # read again, after all the others
    for epoch in range(3):
        assert _order(plan(None), epoch) == list(range(50))


def test_a_run_can_start_anywhere() -> None:
    rng = random.Random(2)
    for _ in range(100):
        plan = _random_plan(rng)
        rank, stop = rng.randrange(plan.world_size), rng.randint(1, 3 * plan.batches_per_epoch)
        start = rng.randint(0, stop)
        whole = list(plan.batches(rank, 0, stop))
        assert [len(batch) for batch in whole] == [plan.batch_size] * stop
        assert list(plan.batches(rank, start, stop)) == whole[start:]
        assert [plan.batch(rank, start)] == list(plan.batches(rank, start, start + 1))


def test_a_sample_comes_to_the_same_place_in_every_epoch() -> None:
    rng = random.Random(3)
    for _ in range(100):
        plan = dataclasses.replace(_random_plan(rng), seed=rng.randrange(10))
        places = [
            {sample: at % plan.samples_per_step for at, sample in enumerate(_order(plan, epoch))}
            for epoch in range(4)
        ]
        assert all(found == places[0] for found in places)


def test_neighbours_come_to_one_place() -> None:
    """Questions about one image stand next to each other."""
    plan = BatchPlan(num_samples=400, batch_size=4, world_size=2, batches_per_step=2, seed=0)
    places = {sample: at % plan.samples_per_step for at, sample in enumerate(_order(plan, 0))}
    assert sum(places[sample] != places[sample + 1] for sample in range(399)) == plan.samples_per_step - 1


def test_batches_by_length_hold_samples_of_like_length_in_any_order() -> None:
    rng = random.Random(4)
    lengths = [rng.choice([100, 300, 301, 305, 700, 1100]) + rng.randrange(20) for _ in range(1003)]
    by_length, as_they_come = (
        BatchPlan(num_samples=1003, batch_size=4, world_size=2, batches_per_step=2, seed=5, lengths=given)
        for given in (lengths, None)
    )

    def padding(plan: BatchPlan, epoch: int) -> float:
        batch_plan = [
            [lengths[sample] for sample in plan.batch(rank, number) if sample is not None]
            for rank in range(2)
            for number in range(epoch * plan.batches_per_epoch, (epoch + 1) * plan.batches_per_epoch)
        ]
        return sum(max(batch) * len(batch) for batch in batch_plan if batch) / sum(lengths) - 1

    for epoch in (0, 1):
        assert padding(by_length, epoch) < 0.1 < 0.5 < padding(as_they_come, epoch)
        assert sorted(_order(by_length, epoch)) == list(range(1003))
    first, second = ([lengths[sample] for sample in _order(by_length, epoch)] for epoch in (0, 1))
    assert first != second
    longest = [max(first[start : start + 8]) for start in range(0, 1000, 8)]
    falls = sum(one > other for one, other in itertools.pairwise(longest))
    assert 40 < falls < 85  # of 124: neither rising nor falling


@pytest.mark.parametrize("epochs", ["1", "2", "0.5", "0.28", "1.1", "0.07", "2.3", "0.001"])
def test_fractions_of_an_epoch(epochs: str) -> None:
    for num_samples in range(1, 210):
        plan = BatchPlan(num_samples=num_samples, batch_size=2)
        exact = max(1, math.ceil(Fraction(epochs) * plan.steps_per_epoch))
        assert plan.num_steps(float(epochs)) == exact
        assert plan.num_steps(float(epochs), max_steps=-1) == exact
        assert plan.num_steps(float(epochs), max_steps=7) == 7
