"""Which sample is trained in which step, by which worker: planned, not drawn.

    BatchPlan.batch(rank, number) -> indices of that worker's number-th batch, None for an empty slot

The plan is arithmetic on (seed, epoch, step), so a run that starts again at step n sees exactly what an
undisturbed run would see from there. A step trains the same samples however many workers share it: its
batches are dealt out to those that there are, in as many passes as that takes, and who gets none in the last
pass has an empty batch.

Each place of a step has a share of the samples that it draws from in every epoch. So a sample always comes to
the same worker, which may have kept what it computed of its image, and neighbours, which often show the same
image, come to one worker.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_SIMILAR = 8
"""Samples of each place that are shuffled among each other where batches are grouped by length."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchPlan:
    """The order of samples, cut into steps, forward passes and workers."""

    num_samples: int
    batch_size: int
    """Samples of one worker's forward pass."""

    world_size: int = 1
    """Workers that share the batches of a step."""

    batches_per_step: int = 1

    seed: int | None = None
    """Shuffles every epoch anew; None keeps the order."""

    lengths: Sequence[int] | None = None
    """Tokens of each sample, roughly: a step then trains samples of like length, to spare padding. Steps come
    in any order. None: whatever comes. Without effect where the order is kept."""

    @property
    def accumulation(self) -> int:
        """Forward passes of each worker in one optimizer step."""
        return -(-self.batches_per_step // self.world_size)

    @property
    def samples_per_step(self) -> int:
        """Samples of all workers in one optimizer step."""
        return self.batch_size * self.batches_per_step

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the data; the last one may be short."""
        return math.ceil(self.num_samples / self.samples_per_step)

    @property
    def batches_per_epoch(self) -> int:
        """Forward passes of each worker in one pass over the data."""
        return self.steps_per_epoch * self.accumulation

    def num_steps(self, epochs: float, max_steps: int = -1) -> int:
        """Return the optimizer steps of a run; `max_steps` above 0 decides alone."""
        if max_steps > 0:
            return max_steps
        # Rounded: 0.28 epochs of 25 steps are 7 steps, but the product is 7.000000000000001.
        return max(1, math.ceil(round(epochs * self.steps_per_epoch, 6)))

    def batch(self, rank: int, number: int) -> list[int | None]:
        """Return the samples of a worker's batch, counted from the start of the run.

        >>> plan = BatchPlan(num_samples=5, batch_size=2, world_size=2, batches_per_step=2)
        >>> [plan.batch(rank=1, number=number) for number in range(2)]
        [[2, 3], [None, None]]
        """
        epoch, in_epoch = divmod(number, self.batches_per_epoch)
        step, turn = divmod(in_epoch, self.accumulation)
        place = turn * self.world_size + rank
        if place >= self.batches_per_step:
            return [None] * self.batch_size
        start = step * self.samples_per_step + place * self.batch_size
        order = _order(self, epoch)
        return [order[at] if at < self.num_samples else None for at in range(start, start + self.batch_size)]

    def batches(self, rank: int, start: int, stop: int) -> Iterator[list[int | None]]:
        """Yield a worker's batches from number `start` to before `stop`."""
        return (self.batch(rank, number) for number in range(start, stop))


@functools.lru_cache(maxsize=2)
def _order(plan: BatchPlan, epoch: int) -> Sequence[int]:
    """Return the samples of an epoch, one place of a step after the other."""
    if plan.seed is None:
        return range(plan.num_samples)
    rng = random.Random(f"{plan.seed}/{epoch}")
    num_full = plan.num_samples // plan.samples_per_step
    # The same for all places: what is of like length meets again. A step that is short comes last.
    turns = [*rng.sample(range(num_full), num_full), num_full]
    window = _SIMILAR if plan.lengths is not None else plan.num_samples
    order = [0] * plan.num_samples
    for place, share in enumerate(_shares(plan)):
        samples: list[int] = []
        for start in range(0, len(share), window):
            nearby = share[start : start + window]
            samples += rng.sample(nearby, len(nearby))
        order[place :: plan.samples_per_step] = [samples[turn] for turn in turns[: len(samples)]]
    return order


def _shares(plan: BatchPlan) -> Iterator[Sequence[int]]:
    """Yield the samples of each place of a step, the same in every epoch."""
    places = range(min(plan.samples_per_step, plan.num_samples))
    if plan.lengths is not None:
        longest_first = _longest_first(plan)
        yield from (longest_first[place :: plan.samples_per_step] for place in places)
    else:
        num_full, rest = divmod(plan.num_samples, plan.samples_per_step)
        starts = [place * num_full + min(place, rest) for place in (*places, len(places))]
        yield from itertools.starmap(range, itertools.pairwise(starts))


@functools.lru_cache(maxsize=1)
def _longest_first(plan: BatchPlan) -> Sequence[int]:
    assert plan.lengths is not None
    lengths = plan.lengths
    return sorted(range(plan.num_samples), key=lambda sample: -lengths[sample])
