"""Which sample is trained in which step, by which worker: planned, not drawn.

    BatchPlan.batch(rank, number) -> indices of that worker's number-th batch, None for an empty slot

The plan is arithmetic on (seed, epoch, step), so a run that starts again at step n sees exactly what an
undisturbed run would see from there. A step trains the same samples however many workers and gradient
accumulation steps share it, as long as their product with the batch size stays the same.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """The order of samples, cut into steps, forward passes and workers."""

    num_samples: int
    batch_size: int
    """Samples of one worker's forward pass."""

    world_size: int = 1
    accumulation: int = 1
    """Forward passes of one step."""

    seed: int | None = None
    """Shuffles every epoch anew; None keeps the order."""

    @property
    def samples_per_step(self) -> int:
        """Samples of all workers in one optimizer step."""
        return self.batch_size * self.world_size * self.accumulation

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

        >>> plan = BatchPlan(num_samples=5, batch_size=2, world_size=2)
        >>> [plan.batch(rank=1, number=number) for number in range(2)]
        [[2, 3], [None, None]]
        """
        epoch, in_epoch = divmod(number, self.batches_per_epoch)
        step, turn = divmod(in_epoch, self.accumulation)
        start = step * self.samples_per_step + (turn * self.world_size + rank) * self.batch_size
        order = _order(self.num_samples, self.seed, epoch)
        return [order[at] if at < self.num_samples else None for at in range(start, start + self.batch_size)]

    def batches(self, rank: int, start: int, stop: int) -> Iterator[list[int | None]]:
        """Yield a worker's batches from number `start` to before `stop`."""
        return (self.batch(rank, number) for number in range(start, stop))


@functools.lru_cache(maxsize=2)
def _order(num_samples: int, seed: int | None, epoch: int) -> list[int]:
    order = list(range(num_samples))
    if seed is not None:
        random.Random(f"{seed}/{epoch}").shuffle(order)
    return order
