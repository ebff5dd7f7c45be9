"""What a training run found, as values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmray.reports.errors import ErrorGroup
from vlmray.reports.gallery import GalleryItem

ADAPTER, MODEL, MERGED, RECORD = "adapter", "model", "merged", "training.json"

Curve = tuple[tuple[float, float], ...]
"""(step, value) by step; a value may be NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check of the finished adapter or model."""

    name: str
    """What holds if it passed: `loads afresh`, `changes the base's logits`."""

    passed: bool
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingReport:
    """One fine-tuning run as the renderers need it."""

    title: str
    """Method, model and dataset: `LoRA on Qwen/Qwen2.5-VL-3B-Instruct, HuggingFaceM4/ChartQA train`."""

    history: Sequence[Mapping[str, Any]]
    """The trainer's log history; steps logged twice, as after a restart, count once, the later entry."""

    metric: str | None
    """Name behind `eval_<metric>` of the history, 0 to 1; None where only the loss is evaluated."""

    num_steps: int
    """Optimizer steps done."""

    num_samples: int
    """Distinct samples trained on."""

    num_failed: int
    """Samples that could not be read or prepared."""

    samples_per_s: float | None
    elapsed_s: float
    num_trainable: int
    """Parameters that were trained."""

    num_parameters: int
    """Parameters of the model, trained or not."""

    num_targets: int | None = None
    """Modules with an adapter; None where the parameters themselves are trained."""

    checks: tuple[Check, ...] = ()
    errors: tuple[ErrorGroup, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the run as given; values of secret ones are not shown."""

    gallery: tuple[GalleryItem, ...] = ()
    """Evaluation samples, answered by the trained model."""

    def curve(self, key: str) -> Curve:
        """Read what the history holds under a key."""
        values = {
            float(entry["step"]): read_value(entry[key])
            for entry in self.history
            if entry.get(key) is not None and entry.get("step") is not None
        }
        return tuple(sorted(values.items()))

    @property
    def train_loss(self) -> Curve:
        """Return the loss of the training batches."""
        return self.curve("loss")

    @property
    def eval_loss(self) -> Curve:
        """Return the loss of the evaluation samples."""
        return self.curve("eval_loss")

    @property
    def eval_score(self) -> Curve:
        """Return the metric of the evaluation samples, empty without a metric."""
        return () if self.metric is None else self.curve(f"eval_{self.metric}")


def read_value(value: Any) -> float:
    """Read a logged number, NaN where it is none: a curve then has a gap, which is said below it."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
