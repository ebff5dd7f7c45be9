"""What an answer is worth, and whether a difference is more than chance."""

from vlmray.metrics.benchmarks import (
    mmmu_choice,
    mmmu_open,
    mmstar_accuracy,
    ocrbench_accuracy,
    ocrbench_formula,
    vqav2_accuracy,
)
from vlmray.metrics.bleu import BLEU, corpus_bleu
from vlmray.metrics.definitions import (
    ANLS_THRESHOLD,
    EVALUATE_PATH,
    METRICS,
    Metric,
    anls,
    choice_accuracy,
    exact_match,
    field_accuracy,
    relaxed_accuracy,
    relaxed_accuracy_normalized,
    rouge,
    score,
    token_f1,
    vqa_accuracy,
)

__all__ = [
    "ANLS_THRESHOLD",
    "BLEU",
    "EVALUATE_PATH",
    "METRICS",
    "Metric",
    "anls",
    "choice_accuracy",
    "corpus_bleu",
    "exact_match",
    "field_accuracy",
    "mmmu_choice",
    "mmmu_open",
    "mmstar_accuracy",
    "ocrbench_accuracy",
    "ocrbench_formula",
    "relaxed_accuracy",
    "relaxed_accuracy_normalized",
    "rouge",
    "score",
    "token_f1",
    "vqa_accuracy",
    "vqav2_accuracy",
]
