"""What an answer is worth, and whether a difference is more than chance."""

from vlmray.metrics.benchmarks import (
    gqa_accuracy,
    mmmu_choice,
    mmmu_open,
    mmstar_accuracy,
    ocrbench_accuracy,
    ocrbench_formula,
    vqav2_accuracy,
)
from vlmray.metrics.bleu import BLEU, corpus_bleu
from vlmray.metrics.chartqapro import chartqapro_accuracy, chartqapro_exact, split_answer
from vlmray.metrics.definitions import (
    EVALUATE_PATH,
    METRICS,
    Metric,
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
from vlmray.metrics.draws import majority, pass_at_k
from vlmray.metrics.similarity import ANLS_THRESHOLD, anls

__all__ = [
    "ANLS_THRESHOLD",
    "BLEU",
    "EVALUATE_PATH",
    "METRICS",
    "Metric",
    "anls",
    "chartqapro_accuracy",
    "chartqapro_exact",
    "choice_accuracy",
    "corpus_bleu",
    "exact_match",
    "field_accuracy",
    "gqa_accuracy",
    "majority",
    "mmmu_choice",
    "mmmu_open",
    "mmstar_accuracy",
    "ocrbench_accuracy",
    "ocrbench_formula",
    "pass_at_k",
    "relaxed_accuracy",
    "relaxed_accuracy_normalized",
    "rouge",
    "score",
    "split_answer",
    "token_f1",
    "vqa_accuracy",
    "vqav2_accuracy",
]
