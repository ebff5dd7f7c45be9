"""The metrics of vlmray as `evaluate` modules, for code that takes those.

    evaluate.load(vlmray.metrics.EVALUATE_PATH, "relaxed_accuracy")

`evaluate` copies this file and runs the copy, so it imports the package and holds one class.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from vlmray import metrics

_NAMES = (*metrics.METRICS, metrics.BLEU)


class VQAMetric(evaluate.Metric):
    """One metric, chosen by the configuration's name, as its mean over samples (BLEU: over the corpus)."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in _NAMES:
            raise ValueError(f"unknown metric {self.config_name!r}; known: {', '.join(_NAMES)}")
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=metrics.METRICS.get(self.config_name, metrics.corpus_bleu).__doc__ or "",
            citation="",
            features=[
                datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
                datasets.Features({"predictions": text, "references": text}),
            ],
        )

    def _compute(self, predictions: list[str], references: list[Any]) -> dict[str, Any]:
        answers = [[found] if isinstance(found, str) else found for found in references]
        if self.config_name == metrics.BLEU:
            score, signature = metrics.corpus_bleu(predictions, answers)
            return {metrics.BLEU: score, "signature": signature}
        metric = metrics.METRICS[self.config_name]
        scores = [metric(*pair) for pair in zip(predictions, answers, strict=True)]
        return {self.config_name: sum(scores) / len(scores)}
