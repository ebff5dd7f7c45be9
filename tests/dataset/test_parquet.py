"""Parquet files at a path or URI."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.datasets import NUM_ROWS, check_rows, hf_dataset, mistake
from vlmray.dataset.parquet import ParquetSource
from vlmray.dataset.sources import open_source


def test_a_uri_reads_like_datasets_does(parquet_parts: Path) -> None:
    source = open_source(parquet_parts.as_uri(), "test")
    assert isinstance(source, ParquetSource)
    assert not source.on_driver
    check_rows(source)
    check_rows(open_source(parquet_parts.as_uri() + "/", "test"))
    local = open_source(str(parquet_parts), "test")
    assert list(local.column_names) == list(source.column_names)
    assert local.read(range(NUM_ROWS)) == source.read(range(NUM_ROWS))
    assert len(open_source(parquet_parts.as_uri(), "train")) == 5


def test_a_uri_of_one_file_takes_any_split(parquet_parts: Path) -> None:
    uri = (parquet_parts / "train-00000.parquet").as_uri()
    for split in ("test", "train", "anything"):
        assert [row["query"] for row in open_source(uri, split).read([3])] == ["question 103"]


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (["a.parquet", "b.parquet"], "test", ["a.parquet", "b.parquet"]),
        (["test-0.parquet", "train-0.parquet", "training.parquet"], "train", ["train-0.parquet"]),
        (["test.parquet", "train.parquet"], "test", ["test.parquet"]),
        (["test/0.parquet", "train/0.parquet"], "test", ["test/0.parquet"]),
        (["human/0.parquet", "test/0.parquet"], "human", ["human/0.parquet"]),
        (["testmini-0.parquet", "test-0.parquet"], "testmini", ["testmini-0.parquet"]),
        (["testmini-0.parquet", "test-0.parquet"], "test", ["test-0.parquet"]),
        (["train-0.parquet"], "test", None),
        (["train/0.parquet", "val/0.parquet"], "test", None),
    ],
)
def test_splits_behind_a_uri(
    files: list[str], split: str, expected: list[str] | None, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"query": [file]}), folder / file)
    if expected is None:
        known = ", ".join(sorted({file.replace("/", "-").partition("-")[0] for file in files}))
        assert mistake(folder.as_uri(), split) == f"--dataset_split '{split}': {folder.as_uri()} has {known}"
    else:
        source = open_source(folder.as_uri(), split)
        assert [row["query"] for row in source.read(range(len(source)))] == expected


def test_parquet_that_datasets_did_not_write(tmp_path: Path) -> None:
    # A map is no type that `datasets` knows.
    notes = pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64()))
    table = pa.table({"query": ["question 0", "question 1"], "notes": notes})
    pq.write_table(table, tmp_path / "rows.parquet")
    check_rows(open_source((tmp_path / "rows.parquet").as_uri(), "test"), num_rows=2)


def test_files_of_different_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"query": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"question": ["b"]}), tmp_path / "b.parquet")
    assert "b.parquet has columns question, but" in mistake(tmp_path.as_uri())


def test_columns_may_stand_in_another_order(tmp_path: Path) -> None:
    """As locally, and whichever columns are asked for."""
    pq.write_table(pa.table({"query": ["question 0"], "n": [0]}), tmp_path / "test-0.parquet")
    pq.write_table(
        pa.table({"n": pa.array([1], pa.int32()), "query": ["question 1"]}), tmp_path / "test-1.parquet"
    )
    for name in (str(tmp_path), tmp_path.as_uri()):
        source = open_source(name, "test")
        check_rows(source, num_rows=2)
        assert [list(row) for row in source.read([0, 1])] == [["query", "n"]] * 2
        assert source.read([1, 0], ["n"]) == [{"n": 1}, {"n": 0}]


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"query": ["a"]}, "test-1.parquet has columns query, but"),
        ({"query": [5], "n": [1]}, "column 'query' of"),
        ({"query": ["a"], "n": ["1"]}, "column 'n' of"),
        ({"query": ["a"], "n": [[1]]}, "column 'n' of"),
    ],
)
def test_columns_of_other_types(other: dict[str, list[object]], problem: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"query": ["question 0"], "n": [0]}), tmp_path / "test-0.parquet")
    pq.write_table(pa.table(other), tmp_path / "test-1.parquet")
    assert problem in mistake(tmp_path.as_uri())


def test_a_column_without_values_in_one_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"query": ["question 0"], "n": [0]}), tmp_path / "test-0.parquet")
    pq.write_table(pa.table({"query": ["question 1"], "n": [None]}), tmp_path / "test-1.parquet")
    source = open_source(tmp_path.as_uri(), "test")
    check_rows(source, num_rows=2)


def test_columns_are_kept_apart_between_reads(parquet_parts: Path) -> None:
    """The row group that was read last is kept, but only for the same columns."""
    source = open_source(parquet_parts.as_uri(), "test")
    for columns in (["query"], None, ["label", "query"], ["query"]):
        assert list(source.read([3], columns)[0]) == (columns or list(source.column_names))
    assert source.read([1], ["human_or_machine"]) == [{"human_or_machine": "machine"}]


@pytest.mark.parametrize("content", ["empty", "truncated", "random"])
def test_damaged_parquet(content: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # Words in a path must not be taken for what is wrong.
    folder = tmp_path / "config" / "split" / "data"
    folder.mkdir(parents=True)
    path = folder / "test.parquet"
    hf_dataset().to_parquet(path)
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "truncated": data[: len(data) // 2], "random": os.urandom(2000)}[content])
    for name in (path, folder, folder.as_uri(), path.as_uri()):
        message = mistake(name)
        assert message.startswith(f"--dataset_name {name}")
        assert "cannot be read: " in message
    assert capfd.readouterr().err == ""  # `datasets` would log it as well
