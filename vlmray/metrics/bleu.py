"""Metrics of a whole set of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmray.metrics.benchmarks import check_answers

BLEU = "bleu"


def corpus_bleu(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> tuple[float, str]:
    """Score BLEU of a whole corpus, 0 to 1, which is not a mean over samples.

    Source: sacrebleu, with its defaults.

    Returns:
        The score, and sacrebleu's signature, without which BLEU scores cannot be compared.

    Raises:
        ValueError: There are no predictions, or not as many as lists of answers.
    """
    if not predictions or len(predictions) != len(answers):
        raise ValueError(f"{len(predictions)} predictions and {len(answers)} lists of answers")
    from sacrebleu.metrics.bleu import BLEU as SacreBLEU

    for accepted in answers:
        check_answers(accepted)
    most = max(map(len, answers))
    streams = [[texts[i] if i < len(texts) else None for texts in answers] for i in range(most)]
    bleu: Any = SacreBLEU()
    return bleu.corpus_score(list(predictions), streams).score / 100, str(bleu.get_signature())
