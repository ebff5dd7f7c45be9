"""Results: nothing is half there, nothing is there twice, and a killed run resumes from any point."""

from __future__ import annotations

import json
import pickle
import random
import threading
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlmray.dataset.slices import mask_rows
from vlmray.inference.result_folder import (
    ABSENT,
    ANSWERED,
    FAILED,
    RESULT_SCHEMA,
    ResultFolder,
    save_sample_outputs,
)
from vlmray.schema import Row
from vlmray.storage.run_folder import NUM_THREADS

OPTIONS = {"model_id": "tiny", "max_new_tokens": 5}
FORMATS = ("files", "parquet", "both")
JPEG = b"\xff\xd8 as good as a picture here"


def _row(number: int, *, error: str | None = None, prediction: str = "first") -> dict[str, Any]:
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


def _save(folder: ResultFolder, *rows: dict[str, Any]) -> None:
    inputs = [{"sample_id": row["sample_id"], "question": row["question"]} for row in rows]
    folder.save(rows, inputs, [JPEG] * len(rows))


def _open(path: Path | str, output_format: str = "both", **options: Any) -> ResultFolder:
    earlier = options.pop("earlier", "resume")
    return ResultFolder.open(str(path), {**OPTIONS, **options}, earlier=earlier, output_format=output_format)


def _names(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def _sorted_rows(folder: ResultFolder) -> list[dict[str, Any]]:
    return sorted(folder.read_results().to_pylist(), key=lambda row: row["sample_id"])


def _resume(folder: ResultFolder, numbers: range) -> list[int]:
    """Do what a run does before it starts; return the rows it will answer."""
    states = folder.states(20)
    pending = [number for number in numbers if states[number] != ANSWERED]
    if pending:
        folder.reopen()
        folder.discard(mask_rows(pending, 20) & (states == FAILED))
    return pending


def _finished(folder: ResultFolder) -> dict[int, bool]:
    """Rows that are here, and whether they were answered."""
    states = folder.states(20)
    return {row: bool(states[row] == ANSWERED) for row in range(20) if states[row] != ABSENT}


def _check_complete(folder: ResultFolder, rows: list[dict[str, Any]]) -> None:
    """Each row is there once, in Parquet and in files alike."""
    assert _sorted_rows(folder) == sorted(rows, key=lambda row: row["sample_id"])
    if folder.output_format == "both":
        assert _sorted_rows(ResultFolder(folder.uri, "files")) == _sorted_rows(folder)


@pytest.mark.parametrize("output_format", FORMATS)
def test_what_is_saved_is_read_back(output_format: str, tmp_path: Path) -> None:
    folder = _open(tmp_path, output_format)
    assert _finished(folder) == {}
    assert folder.read_results().schema == RESULT_SCHEMA
    rows = [_row(0), _row(1, error="image has 0 bytes"), _row(2)]
    _save(folder, *rows[:2])
    _save(folder, rows[2])
    assert _finished(folder) == {0: True, 1: False, 2: True}
    _check_complete(folder, rows)
    assert folder.read_results().schema == RESULT_SCHEMA
    assert folder.read_results(["sample_id", "error"]).column_names == ["sample_id", "error"]
    assert folder.read_image("test-000000") == (None if output_format == "parquet" else JPEG)
    assert folder.read_image("test-000009") is None


@pytest.mark.parametrize("output_format", FORMATS)
def test_files_of_each_format(output_format: str, tmp_path: Path) -> None:
    folder = _open(tmp_path, output_format)
    _save(folder, _row(0), _row(1))
    files = {f"test-00000{n}{suffix}" for n in (0, 1) for suffix in ("_in.json", "_img.jpg", "_out.json")}
    names = _names(tmp_path)
    parts = {name for name in names if name.startswith("predictions/part-test-000000-")}
    assert len(parts) == (0 if output_format == "files" else 1)
    assert names == {"options.json", *parts, *(set() if output_format == "parquet" else files)}
    if output_format != "parquet":
        text = (tmp_path / "test-000000_out.json").read_text(encoding="utf-8")
        assert "Grüße 0?" in text
        assert list(json.loads(text)) == RESULT_SCHEMA.names


def test_a_row_without_an_image_has_no_picture(tmp_path: Path) -> None:
    folder = _open(tmp_path)
    save_sample_outputs(folder, _row(0), {"question": "Why?"})
    assert _names(tmp_path) == {"options.json", "test-000000_in.json", "test-000000_out.json"}


def test_writing_rows_twice_is_writing_them_once(tmp_path: Path) -> None:
    folder = _open(tmp_path)
    for prediction in ("first", "second"):
        _save(folder, _row(0, prediction=prediction), _row(1, prediction=prediction))
    _check_complete(folder, [_row(0, prediction="second"), _row(1, prediction="second")])


# Resuming


@pytest.mark.parametrize("output_format", FORMATS)
def test_failed_rows_are_answered_again_and_replaced(output_format: str, tmp_path: Path) -> None:
    folder = _open(tmp_path, output_format)
    _save(folder, *(_row(number, error="late" if number % 3 == 0 else None) for number in range(8)))
    folder = _open(tmp_path, output_format)
    assert _resume(folder, range(10)) == [0, 3, 6, 8, 9]
    _save(folder, *(_row(number, prediction="second") for number in (0, 3, 6, 8, 9)))
    assert _resume(_open(tmp_path, output_format), range(10)) == []
    again = (0, 3, 6, 8, 9)
    _check_complete(
        folder, [_row(number, prediction="second" if number in again else "first") for number in range(10)]
    )


def test_killed_between_files_and_parquet(tmp_path: Path) -> None:
    folder = _open(tmp_path)
    _save(folder, _row(0))
    for row in (_row(1), _row(2, error="late")):
        save_sample_outputs(folder, row, {}, JPEG)
    (tmp_path / "test-000003_img.jpg").write_bytes(JPEG)  # and within a sample's files
    (tmp_path / "test-000003_in.json").write_text("{}")
    assert _resume(folder, range(4)) == [2, 3]
    assert [row["sample_id"] for row in _sorted_rows(folder)] == ["test-000000", "test-000001"]
    _save(folder, _row(2), _row(3))
    assert _resume(folder, range(4)) == []
    _check_complete(folder, [_row(number) for number in range(4)])


@pytest.mark.parametrize("output_format", ["files", "both"])
def test_a_deleted_answer_is_answered_again(output_format: str, tmp_path: Path) -> None:
    folder = _open(tmp_path, output_format)
    _save(folder, *(_row(number) for number in range(4)))
    (tmp_path / "test-000002_out.json").unlink()
    assert _resume(folder, range(4)) == [2]
    _save(folder, _row(2, prediction="second"))
    _check_complete(
        folder, [_row(number, prediction="second" if number == 2 else "first") for number in range(4)]
    )


def test_a_deleted_part_is_made_again_from_the_files(tmp_path: Path) -> None:
    folder = _open(tmp_path)
    _save(folder, _row(0), _row(1))
    _save(folder, _row(2))
    next((tmp_path / "predictions").glob("part-test-000000-*")).unlink()
    assert _resume(folder, range(3)) == []
    _check_complete(folder, [_row(0), _row(1), _row(2)])


@pytest.mark.parametrize("output_format", FORMATS)
def test_resuming_after_any_death_gives_what_one_run_gives(output_format: str, tmp_path: Path) -> None:
    """Kill runs at random writes, let rows fail at random, go on until all are answered."""
    rng = random.Random(output_format)
    for trial in range(6):
        path = tmp_path / str(trial)
        for _ in range(100):
            folder = _Mortal(_open(path, output_format), rng.randint(1, 30))
            try:
                pending = _resume(folder, range(12))
                size = rng.randint(1, 5)
                for start in range(0, len(pending), size):
                    failing = rng.random() < 0.2
                    block = pending[start : start + size]
                    _save(folder, *(_row(number, error="late" if failing else None) for number in block))
            except KeyboardInterrupt:
                continue
            if not pending:
                break
        assert not pending
        _check_complete(_open(path, output_format), [_row(number) for number in range(12)])
        assert not [name for name in _names(path) if name.endswith(".tmp")]


class _Mortal(ResultFolder):
    """An output folder whose process is killed at one of its writes, half of the time half written."""

    def __init__(self, folder: ResultFolder, num_writes: int) -> None:
        super().__init__(folder.uri, folder.output_format)
        object.__setattr__(self, "_lives", [num_writes])

    def write_bytes(self, name: str, data: bytes) -> None:
        self._lives[0] -= 1
        if self._lives[0] <= 0:
            half_written = Path(self.uri) / f".{name.replace('/', '-')}-{'0' * 32}.tmp"
            half_written.write_bytes(data[: len(data) // 2])
            raise KeyboardInterrupt
        super().write_bytes(name, data)


def test_discard_touches_only_what_it_must(tmp_path: Path) -> None:
    folder = _open(tmp_path, "parquet")
    _save(folder, _row(0), _row(1))
    _save(folder, _row(2), _row(3))
    _save(folder, _row(4))
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "predictions").iterdir()}
    folder.discard(mask_rows([1, 4, 9], 10))
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "predictions").iterdir()}
    assert [row["row_index"] for row in _sorted_rows(folder)] == [0, 2, 3]
    assert len(after) == 2
    assert [name for name in after if after[name] == before[name]] == [max(after)]
    folder.discard(mask_rows([], 10))
    assert [row["row_index"] for row in _sorted_rows(folder)] == [0, 2, 3]


# Options


def test_results_without_options_are_not_resumed(tmp_path: Path) -> None:
    folder = _open(tmp_path)
    _save(folder, _row(0))
    (tmp_path / "options.json").unlink()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"holds results but no options.json that says what they are of"):
            _open(tmp_path, overwrite=overwrite)
    assert _finished(folder) == {0: True}


@pytest.mark.parametrize("output_format", FORMATS)
def test_overwrite_deletes_what_is_ours(output_format: str, tmp_path: Path) -> None:
    folder = _open(tmp_path, output_format)
    _save(folder, _row(0), _row(1, error="late"))
    folder.finish({"summary": 1}, "<html>")
    foreign = {
        "notes.txt", "my_in.json", "holiday_img.jpg", "x/test-000000_out.json", "predictions/notes.parquet",
        "predictions/_SUCCESS", ".hidden.tmp", "test-1_img.jpg",
    }  # fmt: skip
    for name in foreign:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    folder = _open(tmp_path, output_format, earlier="delete", max_new_tokens=99)
    assert _names(tmp_path) == {"options.json", *foreign}
    assert all((tmp_path / name).read_text() == "mine" for name in foreign)
    assert _finished(folder) == {}
    assert _open(tmp_path, output_format, max_new_tokens=99).read_options()["max_new_tokens"] == 99


def test_overwrite_takes_no_folder_that_is_not_ours(tmp_path: Path) -> None:
    for name in ("test-000000_img.jpg", "report.html", "run.json"):
        (tmp_path / name).write_text("mine")
    _open(tmp_path, earlier="delete")
    assert _names(tmp_path) == {"options.json", "test-000000_img.jpg", "report.html", "run.json"}


# Folders and files


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_file_uri_is_a_local_folder(output_format: str, tmp_path: Path) -> None:
    path = tmp_path / "with space" / "50%"
    by_uri = _open(path.as_uri() + "/", output_format)
    assert by_uri.is_local
    _save(by_uri, _row(0), _row(1, error="late"))
    by_path = _open(path, output_format)
    assert by_path.is_local
    assert _finished(by_path) == _finished(by_uri) == {0: True, 1: False}
    assert _sorted_rows(by_path) == _sorted_rows(by_uri)
    by_path.discard(mask_rows([1], 2))
    assert not ResultFolder("s3://bucket/x").is_local


def test_a_folder_travels(tmp_path: Path) -> None:
    folder = _open(tmp_path)
    pickled = pickle.dumps(folder)
    assert len(pickled) < 500
    _save(pickle.loads(pickled), _row(0))
    assert _finished(folder) == {0: True}


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    folder = _Mortal(_open(tmp_path), 2)
    with pytest.raises(KeyboardInterrupt):
        _save(folder, _row(0))
    assert [name for name in _names(tmp_path) if name.endswith(".tmp")]
    (tmp_path / ".mine.tmp").write_text("mine")
    _open(tmp_path)
    assert _names(tmp_path) == {"options.json", ".mine.tmp"}


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"\x00" * 500, None])
def test_a_damaged_part_is_named(damage: bytes | None, tmp_path: Path) -> None:
    folder = _open(tmp_path, "parquet")
    _save(folder, _row(0))
    (part,) = (tmp_path / "predictions").iterdir()
    part.write_bytes(part.read_bytes()[:-40] if damage is None else damage)
    for read in (lambda: folder.states(9), folder.read_results, lambda: folder.discard(mask_rows([0], 1))):
        with pytest.raises(ValueError, match="is damaged") as error_info:
            read()
        assert f"{tmp_path}/predictions/{part.name} is damaged" in str(error_info.value)
        assert str(error_info.value).endswith("delete it to have its samples answered again")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"sample_id": "test-000009", "error": null}'])
@pytest.mark.parametrize("output_format", ["files", "both"])
def test_a_damaged_answer_is_named(text: str, output_format: str, tmp_path: Path) -> None:
    folder = _open(tmp_path, output_format)
    (tmp_path / "test-000000_out.json").write_text(text)
    with pytest.raises(ValueError, match="is damaged") as error_info:
        folder.states(9)
    assert f"{tmp_path}/test-000000_out.json is damaged" in str(error_info.value)


def test_no_part_is_ever_seen_half_written(tmp_path: Path) -> None:
    folder = _open(tmp_path, "parquet")
    rows = [[_row(number, prediction=letter) for number in range(300)] for letter in "ab"]
    folder.write_part(rows[0])
    done = threading.Event()

    def write() -> None:
        for turn in range(60):
            folder.write_part(rows[turn % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    num_reads = 0
    while not done.is_set():
        assert len(set(folder.read_results(["prediction"])["prediction"].to_pylist())) == 1
        num_reads += 1
    writer.join()
    assert num_reads > 5
    assert len(_names(tmp_path)) == 2


def test_the_manifest_is_there_exactly_when_a_run_completed(tmp_path: Path) -> None:
    folder = _open(tmp_path)
    manifest = tmp_path / "run.json"
    _resume(folder, range(2))
    _save(folder, _row(0), _row(1))
    assert not manifest.exists()
    folder.finish({"summary": {"num_rows": 2}}, "<html>")
    assert json.loads(manifest.read_text()) == {"summary": {"num_rows": 2}}
    assert manifest.stat().st_mtime_ns >= (tmp_path / "report.html").stat().st_mtime_ns
    assert _resume(_open(tmp_path), range(2)) == []
    assert manifest.exists()
    assert _resume(_open(tmp_path), range(3)) == [2]
    assert not manifest.exists()
    folder.finish({}, "<html>")
    _open(tmp_path, earlier="delete")
    assert not manifest.exists()


def test_the_parts_are_plain_parquet(tmp_path: Path) -> None:
    folder = _open(tmp_path)
    _save(folder, _row(0), _row(1))
    _save(folder, _row(2))
    table = pq.read_table(tmp_path / "predictions")
    assert table.schema.remove_metadata() == RESULT_SCHEMA
    assert sorted(table["sample_id"].to_pylist()) == ["test-000000", "test-000001", "test-000002"]
    assert pa.types.is_list(table.schema.field("answers").type)


def test_a_run_that_ended_before_its_first_result_binds_nobody(tmp_path: Path) -> None:
    ResultFolder.open(str(tmp_path), {"model_id": "a"})
    (tmp_path / "test-000000_in.json").write_text("{}")  # died between this file and the answer
    ResultFolder.open(str(tmp_path), {"model_id": "b"})
    assert json.loads((tmp_path / "options.json").read_text()) == {"model_id": "b"}
    assert not (tmp_path / "test-000000_in.json").exists()


def test_a_row_has_the_columns_that_travel() -> None:
    """What mypy checks keys by is what is written."""
    assert list(Row.__annotations__)[: len(RESULT_SCHEMA)] == RESULT_SCHEMA.names


# Many rows


def _open_for(
    path: Path, num_rows: int, output_format: str = "auto", *, overwrite: bool = False
) -> ResultFolder:
    return ResultFolder.open_for(
        num_rows, str(path), OPTIONS, earlier="delete" if overwrite else "resume", output_format=output_format
    )


def test_files_of_each_sample_are_the_default_for_few_rows(tmp_path: Path) -> None:
    for num_rows, expected in ((1, "both"), (10_000, "both"), (10_001, "parquet"), (1_000_000, "parquet")):
        path = tmp_path / str(num_rows)
        folder = _open_for(path, num_rows)
        assert (
            folder.output_format
            == json.loads((path / "options.json").read_text())["output_format"]
            == expected
        )
    for output_format in FORMATS:
        assert _open_for(tmp_path / output_format, 10**6, output_format).output_format == output_format


@pytest.mark.parametrize("before", FORMATS)
def test_a_folder_goes_on_in_the_format_it_has(before: str, tmp_path: Path) -> None:
    _save(_open(tmp_path, before), _row(0), _row(1, error="late"))
    options = json.loads((tmp_path / "options.json").read_text()) | {"output_format": before}
    (tmp_path / "options.json").write_text(json.dumps(options))  # as every earlier run recorded it
    for num_rows in (5, 20_000):
        folder = _open_for(tmp_path, num_rows)
        assert folder.output_format == before
        assert _finished(folder) == {0: True, 1: False}
    other = "parquet" if before == "both" else "both"
    with pytest.raises(ValueError, match=f"output_format was '{before}', now '{other}'"):
        _open_for(tmp_path, 5, other)
    assert _open_for(tmp_path, 20_000, overwrite=True).output_format == "parquet"


@pytest.mark.parametrize("output_format", ["files", "both"])
def test_files_of_many_rows_lie_in_subfolders(output_format: str, tmp_path: Path) -> None:
    numbers = (7, 999, 1000, 123_456, 1_000_000)
    folder = _open_for(tmp_path, 20_000, output_format)
    _save(folder, *(_row(number) for number in numbers))
    names = [name for name in _names(tmp_path) if name.startswith("samples/")]
    assert {str(Path(name).parent) for name in names} == {
        "samples/000000", "samples/000001", "samples/000123", "samples/001000",
    }  # fmt: skip
    assert len(names) == 3 * len(numbers)
    assert not [name for name in _names(tmp_path) if name.endswith("_out.json") and "/" not in name]
    assert np.flatnonzero(folder.states(1_000_001) == ANSWERED).tolist() == list(numbers)
    assert [row["row_index"] for row in _sorted_rows(folder)] == sorted(numbers, key="test-{:06d}".format)
    assert folder.rows(sample_ids=["test-123456"])[0]["row_index"] == 123_456
    assert folder.read_image("test-123456") == JPEG
    assert _open_for(tmp_path, 3).is_grouped  # whatever is asked for later


@pytest.mark.parametrize("output_format", ["files", "both"])
def test_files_that_lie_flat_are_gone_on_with_in_subfolders(output_format: str, tmp_path: Path) -> None:
    _save(_open_for(tmp_path, 5, output_format), _row(0), _row(1, error="late"), _row(2))
    folder = _open_for(tmp_path, 20_000, output_format)
    assert _resume(folder, range(4)) == [1, 3]
    assert _finished(folder) == {0: True, 2: True}
    _save(folder, _row(1, prediction="second"), _row(3))
    folder = _open_for(tmp_path, 5, output_format)
    assert _resume(folder, range(4)) == []
    _check_complete(folder, [_row(0), _row(1, prediction="second"), _row(2), _row(3)])
    assert len([name for name in _names(tmp_path) if name.endswith("_out.json")]) == 4
    assert folder.read_image("test-000000") == folder.read_image("test-000003") == JPEG


def test_overwrite_deletes_subfolders_but_not_what_is_in_them(tmp_path: Path) -> None:
    for number in (0, 5000):
        _save(_open_for(tmp_path, 20_000, "both"), _row(number))
    (tmp_path / "samples" / "000005" / "notes.txt").write_text("mine")
    _open_for(tmp_path, 5, overwrite=True)
    assert _names(tmp_path) == {"options.json", "samples/000005/notes.txt"}
    assert not (tmp_path / "samples" / "000000").exists()
    (tmp_path / "samples" / "000005" / "notes.txt").unlink()
    _save(_open_for(tmp_path, 5), _row(0))
    _open_for(tmp_path, 5, overwrite=True)
    assert not (tmp_path / "samples").exists()


def test_rows_of_another_split_do_not_count(tmp_path: Path) -> None:
    folder = _open(tmp_path, "parquet")
    _save(folder, _row(3), _row(30), _row(0) | {"sample_id": "other"})
    assert _finished(folder) == {3: True}
    folder.discard(mask_rows([3], 4))
    assert [row["row_index"] for row in _sorted_rows(folder)] == [0, 30]


def test_parts_are_read_no_further_ahead_than_threads_go(tmp_path: Path) -> None:
    folder = _Counting(str(tmp_path), "parquet")
    for number in range(120):
        folder.write_part([_row(number)])
    for num_seen, table in enumerate(folder.scan(["sample_id"]), start=1):
        assert table.num_rows == 1
        assert len(_Counting.reads) <= num_seen + 3 * NUM_THREADS
    assert num_seen == len(_Counting.reads) == 120


class _Counting(ResultFolder):
    reads: ClassVar[list[str]] = []

    def _read(self, name: str) -> bytes:
        self.reads.append(name)
        return super()._read(name)
