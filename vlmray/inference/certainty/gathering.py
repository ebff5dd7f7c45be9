"""The confidences of a run, row by row, until all are there."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import numpy as np

from vlmray.dataset.rows import image_columns, image_keys
from vlmray.dataset.slices import pack_rows
from vlmray.inference.certainty.assessing import Certainty, assess
from vlmray.inference.plan import InferenceRun
from vlmray.reports.errors import is_failed
from vlmray.schema import Row

_MOST_ROWS = 20_000
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
        step = -(-len(order) // _MOST_ROWS) or 1
        order = order[::step]
        rows = np.asarray(self._rows, np.int64)[order]
        is_known = not all(map(math.isnan, self._sure))
        images = _images(run, pack_rows(rows)) if is_known else None
        sure, right = (np.asarray(values)[order].tolist() for values in (self._sure, self._right))
        known = (None if math.isnan(each) else each for each in sure)
        return assess(
            zip(known, right, images or rows.tolist(), strict=True),
            metric=run.task.metric,
            num_asked=-(-self._num_asked // step),
            target=run.config.target_accuracy,
            knows_images=images is not None or not image_columns(run.source, run.spec),
        )


def _images(run: InferenceRun, rows: Sequence[int]) -> list[bytes | str] | None:
    """Return what tells the images of rows apart, a row's own number where it has none; None: not at hand."""
    source = run.source
    if not (source.on_driver or source.same_image_column is not None):
        return None
    return [key or str(row) for key, row in zip(image_keys(source, run.spec, rows), rows, strict=True)]
