"""What a model is asked while it is trained: evaluation samples, and others whose answers are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from vlmray import metrics
from vlmray.engines.transformers.engine import TransformersEngine
from vlmray.training.collator import DataCollatorForVLMSFT
from vlmray.training.samples import Feature, Features, first_question


@dataclass(kw_only=True, slots=True)
class Evaluation:
    """How a worker evaluates, and what came of it last."""

    read: Callable[[], Iterable[Features]] | None
    """Gives the evaluation samples of this worker anew, a list for each batch, as many lists as every other
    worker's; None evaluates nothing."""

    collator: DataCollatorForVLMSFT
    """Makes their batches, and knows which samples have no loss."""

    metric: str
    num_answered: int
    """How many evaluation samples are answered too, over all workers."""

    batch_size: int
    max_new_tokens: int
    answered: list[dict[str, Any]] = field(default_factory=list)
    """Evaluation samples with the answers of the last evaluation, from all workers."""

    def first(self, features: Features, batches_before: int) -> list[Feature]:
        """Return those of a batch that are answered.

        Args:
            features: A batch.
            batches_before: How many there are before it, those of all workers in turn.
        """
        left = self.num_answered - batches_before * self.batch_size
        return [feature for feature in features[: max(0, left)] if is_good(feature)]

    def answer(self, model: Any, features: Sequence[Feature]) -> list[dict[str, Any]]:
        """Answer the first question of samples greedily, as inference would; return them as result rows."""
        engine = TransformersEngine(model.eval(), self.collator.processor, batch_size=self.batch_size)
        requests = [first_question(feature, self.max_new_tokens) for feature in features]
        try:
            completions = engine.generate(requests)
        finally:
            engine.close()  # only its threads go: the model is the trainer's too
        return [
            {
                **{name: feature[name] for name in ("sample_id", "question", "answers", "family")},
                "prediction": completion.text,
                "error": completion.error,
                "num_completion_tokens": completion.num_completion_tokens,
                "score": self._score(completion.text, feature) if completion.error is None else None,
            }
            for feature, completion in zip(features, completions, strict=True)
        ]

    def _score(self, text: str, feature: Feature) -> float:
        metric = feature.get("own_metric") or self.metric
        return metrics.score(metric, text, feature["answers"], feature.get("choices") or ()).value


def is_good(feature: Feature | None) -> TypeGuard[Feature]:
    """Tell whether a slot holds a sample that could be read."""
    return feature is not None and "error" not in feature
