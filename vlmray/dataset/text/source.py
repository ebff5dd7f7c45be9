"""Rows of text files: CSV, TSV and JSON, as they are written."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from vlmray.dataset.text.files import TextFile
from vlmray.storage.fingerprints import fingerprint_path


class TextSource:
    """Rows of a split that is written as text; all values but lists and structures are texts."""

    on_driver = True
    same_image_column = None

    def __init__(
        self, files: Sequence[TextFile], *, base_dir: Path | None, path: Path | None,
        fingerprint: str | None = None, pictures: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Take over files whose rows were found.

        Args:
            files: Files of the split, in order.
            base_dir: Folder that relative image paths start from.
            path: Local file or folder that the dataset was named by; None where that was the hub.
            fingerprint: What it is known by already.
            pictures: Columns that name files beside the text file they are in, with the columns to make of
                them.

        Raises:
            ValueError: the files have different columns.
        """
        self._files = files
        self._pictures = dict(pictures or {})
        self._ends = list(accumulate(map(len, files)))
        columns = dict.fromkeys(name for file in files for name in file.columns)
        for file in files:
            missing = [name for name in columns if name not in file.columns]
            if missing and file.separator:
                raise ValueError(f"{file.path.name} lacks the column {missing[0]!r} that other files have")
        self.column_names = [self._pictures.get(name, name) for name in columns]
        self.base_dir = str(base_dir) if base_dir else None
        self._path = path
        self._fingerprint = fingerprint

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def fingerprint(self) -> str:
        """Return the hub's commit, or 16 hex digits of the file or folder, as of any local dataset."""
        if self._fingerprint is None:
            assert self._path is not None
            self._fingerprint = fingerprint_path(self._path)
        return self._fingerprint

    def count_filled(self, column: str) -> int:
        """Count the rows that have a value in a column."""
        names = {new: old for old, new in self._pictures.items()}
        return sum(file.filled[names.get(column, column)] for file in self._files)

    def read(self, indices: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Read rows, each file opened once."""
        by_file: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            if not 0 <= index < len(self):
                raise IndexError(f"row {index} is out of range, there are {len(self)}")
            by_file.setdefault(bisect.bisect_right(self._ends, index), []).append(place)
        names = self.column_names if columns is None else columns
        rows: list[dict[str, Any]] = [{} for _ in indices]
        for number, places in by_file.items():
            file = self._files[number]
            first = self._ends[number] - len(file)
            for place, row in zip(places, file.read([indices[at] - first for at in places]), strict=True):
                row = self._with_pictures(row, file) if self._pictures else row
                rows[place] = {name: row.get(name) for name in names}
        return rows

    def _with_pictures(self, row: dict[str, Any], file: TextFile) -> dict[str, Any]:
        return {
            self._pictures.get(name, name): _beside(file.path, value) if name in self._pictures else value
            for name, value in row.items()
        }


def _beside(file: Path, name: Any) -> Any:
    if isinstance(name, list):
        return [_beside(file, item) for item in name]
    return str(file.parent / name) if isinstance(name, str) else None
