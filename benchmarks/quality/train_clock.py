"""Training in a given time: a learning rate that follows the clock, and a trainer that does as it says."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from benchmarks.quality.train_batches import Batch, TimedLoader, on_device, see_images

WARMUP = 0.03
"""Share of the time in which the learning rate rises."""


class Clock:
    """How much of the training's time is over; it starts with the first batch and can be stopped.

    Args:
        budget_s: Seconds there are.
    """

    def __init__(self, budget_s: float) -> None:
        self.budget_s = budget_s
        self._started: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start, without pauses."""
        return 0.0 if self._started is None else time.perf_counter() - self._started

    @property
    def share(self) -> float:
        """Elapsed share of the budget."""
        return self.elapsed_s / self.budget_s

    def start(self) -> None:
        """Start, unless it has started."""
        if self._started is None:
            self._started = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for a while; it has to run."""
        elapsed_s = self.elapsed_s
        yield
        self._started = time.perf_counter() - elapsed_s


def scale_of(share: float) -> float:
    """Return the factor of the learning rate after a share of the time: warm-up, then a cosine to zero.

    >>> [round(scale_of(share), 2) for share in (0.0, 0.015, 0.03, 0.515, 1.0, 1.1)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    if share < WARMUP:
        return share / WARMUP
    return (1 + math.cos(math.pi * min(1.0, (share - WARMUP) / (1 - WARMUP)))) / 2


class ClockTrainer(Trainer):
    """transformers' trainer, with a schedule by the clock and batches that are made elsewhere.

    Args:
        clock: Tells the time.
        loader: Gives the batches.
        **options: Passed to `Trainer`.
    """

    def __init__(self, *, clock: Clock, loader: TimedLoader, **options: Any) -> None:
        super().__init__(**options)
        self._clock = clock
        self._loader = loader

    def get_train_dataloader(self) -> TimedLoader:
        """Return the loader as it is: its batches are ready."""
        return self._loader

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Let the learning rate follow the clock."""
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer, lambda step: scale_of(self._clock.share)
            )
        return self.lr_scheduler

    def compute_loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """Return the model's loss, the mean over all answer tokens of the batch."""
        with self.accelerator.autocast():  # as the rest of the model
            seen = see_images(model, inputs)
        return super().compute_loss(model, seen, *args, **kwargs)

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        return on_device(inputs, self.args.device)
