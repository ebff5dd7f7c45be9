"""Rows for tests, and what every table of rows holds to."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

from PIL import Image

from vlmray.dataset.registry import DatasetSpec
from vlmray.inference.chunks import Chunk, pack, unpack
from vlmray.inference.stages import Task
from vlmray.schema import Row

SPEC = DatasetSpec(question_column="question", image_column="image", answer_column="answer")
TASK = Task(prompt_template="{question}", metric="exact_match")


def make_image(number: int = 0, *, kind: str = "PNG", size: tuple[int, int] = (32, 24)) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", size, (number % 256, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


class ListSource:
    """A source over rows in memory."""

    on_driver = True
    same_image_column = None
    column_names = ("question", "image", "answer")

    def __init__(self, rows: list[dict[str, Any]], base_dir: str | None = None) -> None:
        self._rows = rows
        self.base_dir = base_dir

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        return [{name: self._rows[index][name] for name in columns or self.column_names} for index in indices]


def check_travels(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Send rows as between Ray stages, and see that nothing is lost and they are plain values."""
    back = unpack(pack(Chunk(rows, []))).rows
    assert back == rows
    for row in rows:
        assert set(row) <= set(Row.__annotations__)
        assert {type(value) for value in row.values()} <= {str, bytes, int, float, list, type(None)}
    return back
