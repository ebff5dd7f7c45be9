"""The draws of a run, row by row, until all are there."""

from __future__ import annotations

import math
from array import array

import numpy as np

from vlmray.inference.certainty.gathering import MOST_ROWS, tell_images
from vlmray.inference.drawing.assessing import Drawn, DrawnRow, assess_draws
from vlmray.inference.plan import InferenceRun
from vlmray.schema import Row

COLUMNS = ("sample_scores", "agreement")


class Draws:
    """Agreement and scores of rows that were answered; a few numbers of each are kept.

    Args:
        num_samples: Answers that are drawn to each row.
    """

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples
        self._rows, self._agreements = array("q"), array("d")
        self._right, self._scores = array("d"), array("d")

    def add(self, row: Row) -> None:
        """Take a result row."""
        agreement, score = row.get("agreement"), row.get("score")
        if agreement is None:
            return
        self._rows.append(row["row_index"])
        self._agreements.append(agreement)
        self._right.append(math.nan if score is None else score)
        self._scores.extend(row.get("sample_scores") or [math.nan] * self._num_samples)

    def assess(self, run: InferenceRun) -> Drawn | None:
        """Score them, a part of them where they are many; None where there are none."""
        if not self._rows:
            return None
        order = np.argsort(self._rows)
        order = order[:: -(-len(order) // MOST_ROWS)]
        images, knows_images = tell_images(run, np.asarray(self._rows, np.int64)[order])
        agreements, right = (np.asarray(values)[order].tolist() for values in (self._agreements, self._right))
        scores = np.asarray(self._scores).reshape(-1, self._num_samples)[order].tolist()
        return assess_draws(
            [
                DrawnRow(agreement, None if math.isnan(score) else score, of_all, image)
                for agreement, score, of_all, image in zip(agreements, right, scores, images, strict=True)
            ],
            num_samples=self._num_samples,
            metric=run.task.metric,
            knows_images=knows_images,
        )
