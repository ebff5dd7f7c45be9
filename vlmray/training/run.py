"""A training run before it starts: its samples, and what every worker has to know of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmray.config import FinetuneConfig
from vlmray.training.batch_plan import BatchPlan
from vlmray.training.samples import Conversations, estimate_lengths

TRAIN, EVALUATION = "train", "evaluation"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """The samples of a run; they stay where their source can be read."""

    train: Conversations
    evaluation: Conversations | None = None

    def of(self, name: str) -> Conversations:
        """Return the samples that `train` or `evaluation` stands for."""
        samples = self.train if name == TRAIN else self.evaluation
        assert samples is not None
        return samples


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """A run before it starts, as every worker gets it: everything checked, nothing loaded, no samples."""

    config: FinetuneConfig
    num_samples: int
    num_eval_samples: int
    metric: str
    image_optional: bool
    num_workers: int = 1
    """The most workers at a time. A step trains what they would, also while there are fewer."""

    num_threads: int | None = None
    """CPU threads of each worker; None leaves torch's own choice."""

    lengths: Sequence[int] | None = None
    """Tokens of each sample, roughly, where batches are grouped by them."""

    @classmethod
    def of(cls, config: FinetuneConfig, data: TrainingData, **options: Any) -> TrainingRun:
        """Describe a run over some samples."""
        groups = config.train_sampling_strategy == "group_by_length"
        return cls(
            config=config,
            num_samples=len(data.train),
            num_eval_samples=len(data.evaluation or ()),
            metric=data.train.spec.metric,
            image_optional=data.train.spec.may_lack_images,
            lengths=estimate_lengths(data.train, config.max_pixels) if groups else None,
            **options,
        )

    @property
    def eval_metric(self) -> str:
        """Name in the history by which evaluations are compared."""
        return f"eval_{self.metric}" if self.config.eval_samples else "eval_loss"

    @property
    def greater_is_better(self) -> bool:
        """Whether a higher value of `eval_metric` is the better one."""
        return self.eval_metric != "eval_loss"

    def plan(self, name: str, world_size: int) -> BatchPlan:
        """Return the order of the samples: shuffled to train on, as they come to evaluate on."""
        config = self.config
        if name == EVALUATION:
            return BatchPlan(
                num_samples=self.num_eval_samples,
                batch_size=config.per_device_eval_batch_size,
                world_size=world_size,
                batches_per_step=world_size,
            )
        return BatchPlan(
            num_samples=self.num_samples,
            batch_size=config.per_device_train_batch_size,
            world_size=world_size,
            batches_per_step=self.num_workers * config.gradient_accumulation_steps,
            seed=config.seed,
            lengths=self.lengths,
        )

    @property
    def samples_per_step(self) -> int:
        """Samples of all workers in one optimizer step."""
        return self.plan(TRAIN, self.num_workers).samples_per_step

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.plan(TRAIN, self.num_workers).num_steps(
            self.config.num_train_epochs, self.config.max_steps
        )

    def num_samples_of(self, num_steps: int) -> int:
        """Return how many samples the first steps train; the last step of an epoch may be short."""
        epochs, steps = divmod(num_steps, self.plan(TRAIN, self.num_workers).steps_per_epoch)
        return epochs * self.num_samples + min(steps * self.samples_per_step, self.num_samples)
