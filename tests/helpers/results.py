"""Result rows in folders, written and resumed as a run does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmray.dataset.slices import mask_rows
from vlmray.inference.result_folder import ABSENT, ANSWERED, FAILED, RESULT_SCHEMA, ResultFolder

OPTIONS = {"model_id": "tiny", "max_new_tokens": 5}
FORMATS = ("files", "parquet", "both")
JPEG = b"\xff\xd8 as good as a picture here"


def row_of(number: int, *, error: str | None = None, prediction: str = "first") -> dict[str, Any]:
    return dict.fromkeys(RESULT_SCHEMA.names) | {
        "sample_id": f"test-{number:06d}",
        "row_index": number,
        "question": f"Grüße {number}?",
        "choices": [],
        "answers": ["3", "three"],
        "prediction": None if error else prediction,
        "finish_reason": "error" if error else "stop",
        "score": None if error else 1.0,
        "error": error,
    }


def save(folder: ResultFolder, *rows: dict[str, Any]) -> None:
    inputs = [{"sample_id": row["sample_id"], "question": row["question"]} for row in rows]
    folder.save(rows, inputs, [[JPEG]] * len(rows))


def open_folder(path: Path | str, output_format: str = "both", **options: Any) -> ResultFolder:
    earlier = options.pop("earlier", "resume")
    return ResultFolder.open(str(path), {**OPTIONS, **options}, earlier=earlier, output_format=output_format)


def names_in(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def sorted_rows(folder: ResultFolder) -> list[dict[str, Any]]:
    return sorted(folder.read_results().to_pylist(), key=lambda row: row["sample_id"])


def resume(folder: ResultFolder, numbers: range) -> list[int]:
    """Do what a run does before it starts; return the rows it will answer."""
    states = folder.states(20)
    pending = [number for number in numbers if states[number] != ANSWERED]
    if pending:
        folder.reopen()
        folder.discard(mask_rows(pending, 20) & (states == FAILED))
    return pending


def finished(folder: ResultFolder) -> dict[int, bool]:
    """Rows that are here, and whether they were answered."""
    states = folder.states(20)
    return {row: bool(states[row] == ANSWERED) for row in range(20) if states[row] != ABSENT}


def check_complete(folder: ResultFolder, rows: list[dict[str, Any]]) -> None:
    """Each row is there once, in Parquet and in files alike."""
    assert sorted_rows(folder) == sorted(rows, key=lambda row: row["sample_id"])
    if folder.output_format == "both":
        assert sorted_rows(ResultFolder(folder.uri, "files")) == sorted_rows(folder)
