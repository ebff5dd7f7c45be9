"""The confidences of a run, row by row, until all are there."""

from __future__ import annotations

import math
from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmray.dataset.rows import image_columns, image_keys
from vlmray.dataset.slices import pack_rows
from vlmray.inference.certainty.assessing import Certainty, assess
from vlmray.inference.plan import InferenceRun
from vlmray.reports.errors import is_failed
from vlmray.schema import Row

MOST_ROWS = 20_000
"""More say nothing that these do not, and take a while to be drawn from."""


class Confidences:
    """Confidence and score of rows that have a score; three numbers of each are kept."""

    def __init__(self) -> None:
        self._rows, self._sure, self._right = array("q"), array("d"), array("d")
        self._num_asked = 0

    def add(self, row: Row) -> None:
        """Take a result row."""
        confidence, score = row.get("confidence"), row.get("score")
        self._num_asked += score is not None or is_failed(row)
        if score is not None:
            self._rows.append(row["row_index"])
            self._sure.append(math.nan if confidence is None else confidence)
            self._right.append(score)

    def assess(self, run: InferenceRun) -> Certainty | None:
        """Compare them, a part of them where they are many; None where there are none."""
        order = np.argsort(self._rows)
        step = -(-len(order) // MOST_ROWS) or 1
        order = order[::step]
        rows = np.asarray(self._rows, np.int64)[order]
        is_known = not all(map(math.isnan, self._sure))
        images, knows_images = tell_images(run, rows) if is_known else (rows.tolist(), False)
        sure, right = (np.asarray(values)[order].tolist() for values in (self._sure, self._right))
        known = (None if math.isnan(each) else each for each in sure)
        return assess(
            zip(known, right, images, strict=True),
            metric=run.task.metric,
            num_asked=-(-self._num_asked // step),
            target=run.config.target_accuracy,
            knows_images=knows_images,
        )


def tell_images(run: InferenceRun, rows: NDArray[np.int64]) -> tuple[list[Any], bool]:
    """Return what tells the images of rows apart, and whether rows about one image are told as such.

    A row that has none, or whose image is not at hand, is known by its number.
    """
    source = run.source
    if not (source.on_driver or source.same_image_column is not None):
        return rows.tolist(), not image_columns(source, run.spec)
    keys = image_keys(source, run.spec, pack_rows(rows))
    return [key or str(row) for key, row in zip(keys, rows.tolist(), strict=True)], True
