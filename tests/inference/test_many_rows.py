"""Results of many rows: formats, subfolders, and reading a part at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from helpers.results import (
    FORMATS,
    JPEG,
    OPTIONS,
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
from vlmray.inference.result_folder import ANSWERED, ResultFolder
from vlmray.storage.run_folder import NUM_THREADS


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
    save(open_folder(tmp_path, before), row_of(0), row_of(1, error="late"))
    options = json.loads((tmp_path / "options.json").read_text()) | {"output_format": before}
    (tmp_path / "options.json").write_text(json.dumps(options))  # as every earlier run recorded it
    for num_rows in (5, 20_000):
        folder = _open_for(tmp_path, num_rows)
        assert folder.output_format == before
        assert finished(folder) == {0: True, 1: False}
    other = "parquet" if before == "both" else "both"
    with pytest.raises(ValueError, match=f"output_format was '{before}', now '{other}'"):
        _open_for(tmp_path, 5, other)
    assert _open_for(tmp_path, 20_000, overwrite=True).output_format == "parquet"


@pytest.mark.parametrize("output_format", ["files", "both"])
def test_files_of_many_rows_lie_in_subfolders(output_format: str, tmp_path: Path) -> None:
    numbers = (7, 999, 1000, 123_456, 1_000_000)
    folder = _open_for(tmp_path, 20_000, output_format)
    save(folder, *(row_of(number) for number in numbers))
    names = [name for name in names_in(tmp_path) if name.startswith("samples/")]
    assert {str(Path(name).parent) for name in names} == {
        "samples/000000", "samples/000001", "samples/000123", "samples/001000",
    }  # fmt: skip
    assert len(names) == 3 * len(numbers)
    assert not [name for name in names_in(tmp_path) if name.endswith("_out.json") and "/" not in name]
    assert np.flatnonzero(folder.states(1_000_001) == ANSWERED).tolist() == list(numbers)
    assert [row["row_index"] for row in sorted_rows(folder)] == sorted(numbers, key="test-{:06d}".format)
    assert folder.rows(sample_ids=["test-123456"])[0]["row_index"] == 123_456
    assert folder.read_images("test-123456") == [JPEG]
    assert _open_for(tmp_path, 3).is_grouped  # whatever is asked for later


@pytest.mark.parametrize("output_format", ["files", "both"])
def test_files_that_lie_flat_are_gone_on_with_in_subfolders(output_format: str, tmp_path: Path) -> None:
    save(_open_for(tmp_path, 5, output_format), row_of(0), row_of(1, error="late"), row_of(2))
    folder = _open_for(tmp_path, 20_000, output_format)
    assert resume(folder, range(4)) == [1, 3]
    assert finished(folder) == {0: True, 2: True}
    save(folder, row_of(1, prediction="second"), row_of(3))
    folder = _open_for(tmp_path, 5, output_format)
    assert resume(folder, range(4)) == []
    check_complete(folder, [row_of(0), row_of(1, prediction="second"), row_of(2), row_of(3)])
    assert len([name for name in names_in(tmp_path) if name.endswith("_out.json")]) == 4
    assert folder.read_images("test-000000") == folder.read_images("test-000003") == [JPEG]


def test_overwrite_deletes_subfolders_but_not_what_is_in_them(tmp_path: Path) -> None:
    for number in (0, 5000):
        save(_open_for(tmp_path, 20_000, "both"), row_of(number))
    (tmp_path / "samples" / "000005" / "notes.txt").write_text("mine")
    _open_for(tmp_path, 5, overwrite=True)
    assert names_in(tmp_path) == {"options.json", "samples/000005/notes.txt"}
    assert not (tmp_path / "samples" / "000000").exists()
    (tmp_path / "samples" / "000005" / "notes.txt").unlink()
    save(_open_for(tmp_path, 5), row_of(0))
    _open_for(tmp_path, 5, overwrite=True)
    assert not (tmp_path / "samples").exists()


def test_rows_of_another_split_do_not_count(tmp_path: Path) -> None:
    folder = open_folder(tmp_path, "parquet")
    save(folder, row_of(3), row_of(30), row_of(0) | {"sample_id": "other"})
    assert finished(folder) == {3: True}
    folder.discard(mask_rows([3], 4))
    assert [row["row_index"] for row in sorted_rows(folder)] == [0, 30]


def test_parts_are_read_no_further_ahead_than_threads_go(tmp_path: Path) -> None:
    folder = _Counting(str(tmp_path), "parquet")
    for number in range(120):
        folder.write_part([row_of(number)])
    for num_seen, table in enumerate(folder.scan(["sample_id"]), start=1):
        assert table.num_rows == 1
        assert len(_Counting.reads) <= num_seen + 3 * NUM_THREADS
    assert num_seen == len(_Counting.reads) == 120


class _Counting(ResultFolder):
    reads: ClassVar[list[str]] = []

    def _read(self, name: str) -> bytes:
        self.reads.append(name)
        return super()._read(name)
