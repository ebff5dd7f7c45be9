"""How alike two texts are, by the edits from one to the other."""

from __future__ import annotations

ANLS_THRESHOLD = 0.5


def anls(prediction: str, answer: str, *, threshold: float = ANLS_THRESHOLD) -> float:
    """Score the edit similarity of two texts, 0 below `threshold` (one term of ANLS).

    Source: ST-VQA (arXiv 1905.13648), as the DocVQA evaluation script, lmms-eval and VLMEvalKit compute
    it: case and repeated whitespace are ignored, lengths are those of the raw texts, and a similarity of
    exactly the threshold counts (the paper's formula drops it).

    >>> anls("Helo", "hello"), anls("cat", "dog"), anls("ab", "ac")
    (0.8, 0.0, 0.5)
    """
    length = max(len(prediction), len(answer))
    left, right = (" ".join(text.lower().split()) for text in (prediction, answer))
    if left == right:
        return 1.0
    # The distance is at least the difference in length: do not compare a page with a word.
    if abs(len(left) - len(right)) > length * (1 - threshold):
        return 0.0
    similarity = max(0.0, 1 - _levenshtein(left, right) / length)
    return similarity if similarity >= threshold else 0.0


def _levenshtein(left: str, right: str) -> int:
    """Count the insertions, deletions and substitutions between two texts, one row of the table at a time."""
    row = list(range(len(right) + 1))
    for i, left_char in enumerate(left, start=1):
        diagonal, row[0] = row[0], i
        for j, right_char in enumerate(right, start=1):
            substituted = diagonal + (left_char != right_char)
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, substituted)
    return row[-1]
