"""A source that makes its rows of another's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmray.dataset.sources import Source


class Layer:
    """What a source has in common with the one below it: all but how rows are read.

    Args:
        below: The source that rows are made of, one of each.
    """

    def __init__(self, below: Source) -> None:
        self.below = below

    @property
    def column_names(self) -> Sequence[str]:
        """Names of all columns."""
        return self.below.column_names

    @property
    def on_driver(self) -> bool:
        """Whether rows lie on the driver's machine."""
        return self.below.on_driver

    @property
    def base_dir(self) -> str | None:
        """Folder that relative image paths start from."""
        return self.below.base_dir

    @property
    def same_image_column(self) -> str | None:
        """Column whose values tell which rows have an image in common."""
        return self.below.same_image_column

    def __len__(self) -> int:
        return len(self.below)

    def fingerprint(self) -> str:
        """Return what changes when the rows do."""
        return self.below.fingerprint()

    def count_filled(self, column: str) -> int | None:
        """Count the rows that have a value in a column."""
        return self.below.count_filled(column)

    def read(self, indices: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Return rows by index."""
        raise NotImplementedError
