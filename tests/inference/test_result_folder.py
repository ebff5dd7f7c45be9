"""Results: nothing is half there, nothing is there twice, and a killed run resumes from any point."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.results import (
    FORMATS,
    JPEG,
    check_complete,
    finished,
    names_in,
    open_folder,
    resume,
    row_of,
    save,
    sorted_rows,
)
from vlmray.dataset.slices import mask_rows
from vlmray.inference.result_folder import (
    RESULT_SCHEMA,
    ResultFolder,
    save_sample_outputs,
)
from vlmray.schema import Row


@pytest.mark.parametrize("output_format", FORMATS)
def test_what_is_saved_is_read_back(output_format: str, tmp_path: Path) -> None:
    folder = open_folder(tmp_path, output_format)
    assert finished(folder) == {}
    assert folder.read_results().schema == RESULT_SCHEMA
    rows = [row_of(0), row_of(1, error="image has 0 bytes"), row_of(2)]
    save(folder, *rows[:2])
    save(folder, rows[2])
    assert finished(folder) == {0: True, 1: False, 2: True}
    check_complete(folder, rows)
    assert folder.read_results().schema == RESULT_SCHEMA
    assert folder.read_results(["sample_id", "error"]).column_names == ["sample_id", "error"]
    assert folder.read_images("test-000000") == ([] if output_format == "parquet" else [JPEG])
    assert folder.read_images("test-000009") == []


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("is_grouped", [False, True])
def test_answers_of_a_chunk_that_is_written_are_found(
    output_format: str, is_grouped: bool, tmp_path: Path
) -> None:
    folder = dataclasses.replace(open_folder(tmp_path, output_format), is_grouped=is_grouped)
    names = [f"test-{index:06d}" for index in range(4)]
    assert folder.answered(names) == {}
    save(folder, row_of(0), row_of(1, error="image has 0 bytes"), row_of(2))
    save(folder, row_of(7))
    assert folder.answered(names) == {names[0]: row_of(0), names[2]: row_of(2)}


def test_of_a_chunk_of_which_only_files_are_written_answers_are_found(tmp_path: Path) -> None:
    folder = open_folder(tmp_path, "both")
    save_sample_outputs(folder, row_of(1), {})
    assert [*folder.answered(["test-000000", "test-000001"])] == ["test-000001"]


@pytest.mark.parametrize("output_format", FORMATS)
def test_files_of_each_format(output_format: str, tmp_path: Path) -> None:
    folder = open_folder(tmp_path, output_format)
    save(folder, row_of(0), row_of(1))
    files = {f"test-00000{n}{suffix}" for n in (0, 1) for suffix in ("_in.json", "_img.jpg", "_out.json")}
    names = names_in(tmp_path)
    parts = {name for name in names if name.startswith("predictions/part-test-000000-")}
    assert len(parts) == (0 if output_format == "files" else 1)
    assert names == {"options.json", *parts, *(set() if output_format == "parquet" else files)}
    if output_format != "parquet":
        text = (tmp_path / "test-000000_out.json").read_text(encoding="utf-8")
        assert "Grüße 0?" in text
        assert list(json.loads(text)) == RESULT_SCHEMA.names


def test_a_row_without_an_image_has_no_picture(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    save_sample_outputs(folder, row_of(0), {"question": "Why?"})
    assert names_in(tmp_path) == {"options.json", "test-000000_in.json", "test-000000_out.json"}


def test_writing_rows_twice_is_writing_them_once(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    for prediction in ("first", "second"):
        save(folder, row_of(0, prediction=prediction), row_of(1, prediction=prediction))
    check_complete(folder, [row_of(0, prediction="second"), row_of(1, prediction="second")])


# Resuming


@pytest.mark.parametrize("output_format", FORMATS)
def test_failed_rows_are_answered_again_and_replaced(output_format: str, tmp_path: Path) -> None:
    folder = open_folder(tmp_path, output_format)
    save(folder, *(row_of(number, error="late" if number % 3 == 0 else None) for number in range(8)))
    folder = open_folder(tmp_path, output_format)
    assert resume(folder, range(10)) == [0, 3, 6, 8, 9]
    save(folder, *(row_of(number, prediction="second") for number in (0, 3, 6, 8, 9)))
    assert resume(open_folder(tmp_path, output_format), range(10)) == []
    again = (0, 3, 6, 8, 9)
    check_complete(
        folder,
        [row_of(number, prediction="second" if number in again else "first") for number in range(10)],
    )


def test_killed_between_files_and_parquet(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    save(folder, row_of(0))
    for row in (row_of(1), row_of(2, error="late")):
        save_sample_outputs(folder, row, {}, [JPEG])
    (tmp_path / "test-000003_img.jpg").write_bytes(JPEG)  # and within a sample's files
    (tmp_path / "test-000003_in.json").write_text("{}")
    assert resume(folder, range(4)) == [2, 3]
    assert [row["sample_id"] for row in sorted_rows(folder)] == ["test-000000", "test-000001"]
    save(folder, row_of(2), row_of(3))
    assert resume(folder, range(4)) == []
    check_complete(folder, [row_of(number) for number in range(4)])


@pytest.mark.parametrize("output_format", ["files", "both"])
def test_a_deleted_answer_is_answered_again(output_format: str, tmp_path: Path) -> None:
    folder = open_folder(tmp_path, output_format)
    save(folder, *(row_of(number) for number in range(4)))
    (tmp_path / "test-000002_out.json").unlink()
    assert resume(folder, range(4)) == [2]
    save(folder, row_of(2, prediction="second"))
    check_complete(
        folder, [row_of(number, prediction="second" if number == 2 else "first") for number in range(4)]
    )


def test_a_deleted_part_is_made_again_from_the_files(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    save(folder, row_of(0), row_of(1))
    save(folder, row_of(2))
    next((tmp_path / "predictions").glob("part-test-000000-*")).unlink()
    assert resume(folder, range(3)) == []
    check_complete(folder, [row_of(0), row_of(1), row_of(2)])


@pytest.mark.parametrize("output_format", FORMATS)
def test_resuming_after_any_death_gives_what_one_run_gives(output_format: str, tmp_path: Path) -> None:
    """Kill runs at random writes, let rows fail at random, go on until all are answered."""
    rng = random.Random(output_format)
    for trial in range(6):
        path = tmp_path / str(trial)
        for _ in range(100):
            folder = _Mortal(open_folder(path, output_format), rng.randint(1, 30))
            try:
                pending = resume(folder, range(12))
                size = rng.randint(1, 5)
                for start in range(0, len(pending), size):
                    failing = rng.random() < 0.2
                    block = pending[start : start + size]
                    save(folder, *(row_of(number, error="late" if failing else None) for number in block))
            except KeyboardInterrupt:
                continue
            if not pending:
                break
        assert not pending
        check_complete(open_folder(path, output_format), [row_of(number) for number in range(12)])
        assert not [name for name in names_in(path) if name.endswith(".tmp")]


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
    folder = open_folder(tmp_path, "parquet")
    save(folder, row_of(0), row_of(1))
    save(folder, row_of(2), row_of(3))
    save(folder, row_of(4))
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "predictions").iterdir()}
    folder.discard(mask_rows([1, 4, 9], 10))
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "predictions").iterdir()}
    assert [row["row_index"] for row in sorted_rows(folder)] == [0, 2, 3]
    assert len(after) == 2
    assert [name for name in after if after[name] == before[name]] == [max(after)]
    folder.discard(mask_rows([], 10))
    assert [row["row_index"] for row in sorted_rows(folder)] == [0, 2, 3]


# Options


def test_results_without_options_are_not_resumed(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    save(folder, row_of(0))
    (tmp_path / "options.json").unlink()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"holds results but no options.json that says what they are of"):
            open_folder(tmp_path, overwrite=overwrite)
    assert finished(folder) == {0: True}


@pytest.mark.parametrize("output_format", FORMATS)
def test_overwrite_deletes_what_is_ours(output_format: str, tmp_path: Path) -> None:
    folder = open_folder(tmp_path, output_format)
    save(folder, row_of(0), row_of(1, error="late"))
    folder.finish({"summary": 1}, "<html>")
    foreign = {
        "notes.txt", "my_in.json", "holiday_img.jpg", "x/test-000000_out.json", "predictions/notes.parquet",
        "predictions/_SUCCESS", ".hidden.tmp", "test-1_img.jpg",
    }  # fmt: skip
    for name in foreign:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    folder = open_folder(tmp_path, output_format, earlier="delete", max_new_tokens=99)
    assert names_in(tmp_path) == {"options.json", *foreign}
    assert all((tmp_path / name).read_text() == "mine" for name in foreign)
    assert finished(folder) == {}
    assert open_folder(tmp_path, output_format, max_new_tokens=99).read_options()["max_new_tokens"] == 99


def test_overwrite_takes_no_folder_that_is_not_ours(tmp_path: Path) -> None:
    for name in ("test-000000_img.jpg", "report.html", "run.json"):
        (tmp_path / name).write_text("mine")
    open_folder(tmp_path, earlier="delete")
    assert names_in(tmp_path) == {"options.json", "test-000000_img.jpg", "report.html", "run.json"}


# Folders and files


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_file_uri_is_a_local_folder(output_format: str, tmp_path: Path) -> None:
    path = tmp_path / "with space" / "50%"
    by_uri = open_folder(path.as_uri() + "/", output_format)
    assert by_uri.is_local
    save(by_uri, row_of(0), row_of(1, error="late"))
    by_path = open_folder(path, output_format)
    assert by_path.is_local
    assert finished(by_path) == finished(by_uri) == {0: True, 1: False}
    assert sorted_rows(by_path) == sorted_rows(by_uri)
    by_path.discard(mask_rows([1], 2))
    assert not ResultFolder("s3://bucket/x").is_local


def test_a_folder_travels(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    pickled = pickle.dumps(folder)
    assert len(pickled) < 500
    save(pickle.loads(pickled), row_of(0))
    assert finished(folder) == {0: True}


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    folder = _Mortal(open_folder(tmp_path), 2)
    with pytest.raises(KeyboardInterrupt):
        save(folder, row_of(0))
    assert [name for name in names_in(tmp_path) if name.endswith(".tmp")]
    (tmp_path / ".mine.tmp").write_text("mine")
    open_folder(tmp_path)
    assert names_in(tmp_path) == {"options.json", ".mine.tmp"}


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"\x00" * 500, None])
def test_a_damaged_part_is_named(damage: bytes | None, tmp_path: Path) -> None:
    folder = open_folder(tmp_path, "parquet")
    save(folder, row_of(0))
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
    folder = open_folder(tmp_path, output_format)
    (tmp_path / "test-000000_out.json").write_text(text)
    with pytest.raises(ValueError, match="is damaged") as error_info:
        folder.states(9)
    assert f"{tmp_path}/test-000000_out.json is damaged" in str(error_info.value)


def test_no_part_is_ever_seen_half_written(tmp_path: Path) -> None:
    folder = open_folder(tmp_path, "parquet")
    rows = [[row_of(number, prediction=letter) for number in range(300)] for letter in "ab"]
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
    assert len(names_in(tmp_path)) == 2


def test_the_manifest_is_there_exactly_when_a_run_completed(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    manifest = tmp_path / "run.json"
    resume(folder, range(2))
    save(folder, row_of(0), row_of(1))
    assert not manifest.exists()
    folder.finish({"summary": {"num_rows": 2}}, "<html>")
    assert json.loads(manifest.read_text()) == {"summary": {"num_rows": 2}}
    assert manifest.stat().st_mtime_ns >= (tmp_path / "report.html").stat().st_mtime_ns
    assert resume(open_folder(tmp_path), range(2)) == []
    assert manifest.exists()
    assert resume(open_folder(tmp_path), range(3)) == [2]
    assert not manifest.exists()
    folder.finish({}, "<html>")
    open_folder(tmp_path, earlier="delete")
    assert not manifest.exists()


def test_the_parts_are_plain_parquet(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    save(folder, row_of(0), row_of(1))
    save(folder, row_of(2))
    table = pq.read_table(tmp_path / "predictions")
    assert table.schema.remove_metadata() == RESULT_SCHEMA
    assert sorted(table["sample_id"].to_pylist()) == ["test-000000", "test-000001", "test-000002"]
    assert pa.types.is_list(table.schema.field("answers").type)


def test_a_folder_from_before_there_were_forms_is_read(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    save(folder, row_of(0))
    (part,) = (tmp_path / "predictions").iterdir()
    pq.write_table(pq.read_table(part).drop_columns(["parsed", "keeps_form"]), part)
    old = json.loads((out := tmp_path / "test-000000_out.json").read_text())
    out.write_text(json.dumps({name: old[name] for name in old if name not in ("parsed", "keeps_form")}))
    save(folder, row_of(1))
    for each in (folder, open_folder(tmp_path)):
        table = each.read_results()
        assert table.schema.remove_metadata() == RESULT_SCHEMA
        assert table["parsed"].to_pylist() == [None, None]
    assert resume(folder, range(2)) == []


def test_a_run_that_ended_before_its_first_result_binds_nobody(tmp_path: Path) -> None:
    ResultFolder.open(str(tmp_path), {"model_id": "a"})
    (tmp_path / "test-000000_in.json").write_text("{}")  # died between this file and the answer
    ResultFolder.open(str(tmp_path), {"model_id": "b"})
    assert json.loads((tmp_path / "options.json").read_text()) == {"model_id": "b"}
    assert not (tmp_path / "test-000000_in.json").exists()


def test_a_row_has_the_columns_that_travel() -> None:
    """What mypy checks keys by is what is written."""
    assert list(Row.__annotations__)[: len(RESULT_SCHEMA)] == RESULT_SCHEMA.names
