"""GQA, whose questions are in one configuration and their images in another."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from vlmray.dataset.benchmarks.layer import Layer
from vlmray.dataset.sources import Source

COLUMNS = frozenset({"imageId", "question", "fullAnswer"})
"""Columns that tell its questions."""

_IMAGE, _KEY, _ID = "image", "imageId", "id"
_QUESTIONS, _IMAGES = "_instructions", "_images"


def images_beside(config: str | None) -> str | None:
    """Return the configuration that has the images of one with questions."""
    return config.removesuffix(_QUESTIONS) + _IMAGES if config and config.endswith(_QUESTIONS) else None


class GQA(Layer):
    """Questions, each with its image.

    Args:
        below: The questions.
        images: The images, each with its id.
    """

    same_image_column = _KEY

    def __init__(self, below: Source, images: Source) -> None:
        super().__init__(below)
        self.images = images

    def __reduce__(self) -> tuple[Any, ...]:
        return GQA, (self.below, self.images)  # where images lie is found again in a second

    @property
    def column_names(self) -> Sequence[str]:
        """Names of all columns."""
        return [*self.below.column_names, _IMAGE]

    def fingerprint(self) -> str:
        """Return what changes when questions or images do."""
        return "-".join(dict.fromkeys([self.below.fingerprint(), self.images.fingerprint()]))

    def count_filled(self, column: str) -> int | None:
        """Count the rows that have a value in a column, or name an image."""
        return self.below.count_filled(_KEY if column == _IMAGE else column)

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        rows = self.images.read(range(len(self.images)), [_ID])
        return {row[_ID]: index for index, row in enumerate(rows)}

    def read(self, indices: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Return rows by index; an image is read once for all rows that show it."""
        wanted = self.column_names if columns is None else columns
        needed = {*wanted} - {_IMAGE} | ({_KEY} if _IMAGE in wanted else set())
        rows = self.below.read(indices, list(needed))
        keys = [key for key in dict.fromkeys(row.get(_KEY) for row in rows) if key in self._places]
        images = {}
        if _IMAGE in wanted and keys:
            found = self.images.read([self._places[key] for key in keys], [_IMAGE])
            images = {key: row[_IMAGE] for key, row in zip(keys, found, strict=True)}
        return [
            {name: images.get(row[_KEY]) if name == _IMAGE else row[name] for name in wanted} for row in rows
        ]
