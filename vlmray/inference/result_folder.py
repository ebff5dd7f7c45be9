"""Result rows in a run's folder: files of each sample and Parquet, atomic and resumable.

    {sample_id}_in.json, _img.jpg    what was asked; further images are _img_2.jpg, _img_3.jpg, ...
    {sample_id}_out.json             what was answered, written after the two above
    samples/000012/...               the same three of rows 12,000 to 12,999, where many rows were asked for
    images.json                      sizes and times of the image files that rows name by path
    predictions/part-*.parquet       the same rows; a sample is in one part at most

However many rows there are, a part is read at a time, and what is known of a row is a byte. No Ray here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import PurePosixPath
from typing import Any, Self, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vlmray.dataset.slices import row_indices
from vlmray.schema import Row
from vlmray.storage.run_folder import RunFolder
from vlmray.storage.run_options import Earlier
from vlmray.storage.threads import NUM_THREADS, map_ahead

ABSENT, FAILED, ANSWERED = range(3)
"""What a folder holds of a row."""

BATCH_OUTPUT = "batch_output.jsonl"
"""Answers as OpenAI's batch files have them, where rows were requests."""

MOST_ROWS_WITH_FILES = 10_000
"""Rows of a run beyond which `auto` writes no files of each sample, and these lie in subfolders."""

RESULT_SCHEMA = pa.schema(
    {
        "sample_id": pa.string(), "row_index": pa.int64(), "question": pa.string(),
        "choices": pa.list_(pa.string()), "answers": pa.list_(pa.string()), "family": pa.string(),
        "prompt": pa.string(), "prediction": pa.string(), "parsed": pa.string(), "keeps_form": pa.bool_(),
        "metric": pa.string(), "score": pa.float64(), "samples": pa.list_(pa.string()),
        "sample_scores": pa.list_(pa.float64()), "agreement": pa.float64(), "num_prompt_tokens": pa.int32(),
        "num_completion_tokens": pa.int32(), "confidence": pa.float64(),
        "min_token_probability": pa.float64(), "logprobs": pa.string(), "finish_reason": pa.string(),
        "error": pa.string(),
    }
)  # fmt: skip
"""Columns of a result row, in `_out.json` and in Parquet alike; an older folder lacks those of forms, of
confidence and of several draws."""

_PARTS, _GROUPS, _STAMPS = "predictions", "samples", "images.json"
_GROUP_SIZE = 1000
_ROWS_PER_READ = 1024
_IN, _OUT = "_in.json", "_out.json"
_SAMPLE_FILE = re.compile(r".+-\d{6,}(_in\.json|_img(_\d+)?\.jpg|_out\.json)")
_PART_FILE = re.compile(r"part-.+\.parquet")
_CURE = "delete it to have its samples answered again"


@dataclass(frozen=True, slots=True)
class ResultFolder(RunFolder):
    """A folder of result rows."""

    output_format: str = "both"
    """`files`, `parquet` or `both`."""

    is_grouped: bool = False
    """Whether files of samples are written into subfolders; they are read wherever they are."""

    @classmethod
    def open_for(
        cls,
        num_rows: int,
        output_dir: str,
        options: Mapping[str, Any],
        *,
        earlier: Earlier,
        output_format: str,
        dry_run: bool = False,
    ) -> Self:
        """Open the folder of a run over so many rows; what they are written as is one of its options.

        Args:
            num_rows: Rows of the run.
            output_dir: Local folder or URI.
            options: Everything else the results depend on.
            earlier: What is done with the results of an earlier run.
            output_format: As the option; `auto` is what an earlier run wrote, else up to the number of rows.
            dry_run: Leave it as it is.

        Raises:
            ValueError: as of `open`.
        """
        found = cls.find(output_dir, "infer")
        resumes = earlier == "resume" and found.has_results()
        is_large = num_rows > MOST_ROWS_WITH_FILES
        if output_format == "auto":
            before = (found.read_options() or {}).get("output_format") if resumes else None
            output_format = before or ("parquet" if is_large else "both")
        return cls.open(
            output_dir, {**options, "output_format": output_format}, earlier=earlier,
            output_format=output_format, is_grouped=is_large or (resumes and found.has(_GROUPS)),
            dry_run=dry_run,
        )  # fmt: skip

    def save(
        self, rows: Sequence[Row], inputs: Iterable[dict[str, Any]], images: Iterable[Sequence[bytes | None]]
    ) -> None:
        """Write finished rows, files first: whatever has an `_out.json` is never generated again.

        Args:
            rows: Result rows (`RESULT_SCHEMA`).
            inputs: What `_in.json` records, one for each row; not looked at where there are no files.
            images: JPEGs of the images of each row, or None; likewise.
        """
        if self.output_format != "parquet":
            for row, asked, pictures in zip(rows, inputs, images, strict=True):
                save_sample_outputs(self, row, asked, pictures)
        if self.output_format != "files":
            self.write_part(rows)

    def write_part(self, rows: Sequence[Row]) -> None:
        """Write rows as one Parquet part, named by its samples: writing it twice is writing it once."""
        names = [row["sample_id"] for row in rows]
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]
        self._write_table(
            f"{_PARTS}/part-{names[0]}-{digest}.parquet", pa.Table.from_pylist(rows, RESULT_SCHEMA)
        )

    def states(self, num_rows: int) -> NDArray[np.int8]:
        """Return what is here of each row of a split: `ABSENT`, `FAILED` or `ANSWERED`.

        Failed are, too, rows whose `_out.json` somebody deleted. A run that died between a sample's files
        and its Parquet part left the files: the part is written now, so that both say the same.
        """
        states = np.full(num_rows, ABSENT, np.int8)
        if self.output_format != "files":
            for table in self.scan(("sample_id", "error")):
                _note(states, table)
        if self.output_format != "parquet":
            self._note_files(states)
        return states

    def _note_files(self, states: NDArray[np.int8]) -> None:
        listed = np.zeros(len(states), np.bool_)
        for paths in self._answers():
            rows = row_indices(pa.array([_sample_id(path) for path in paths], pa.string()))
            known = (rows >= 0) & (rows < len(states))
            listed[rows[known]] = True
            new = known & (states[np.where(known, rows, 0)] == ABSENT)
            for found in self._read_out_files(
                [path for path, is_new in zip(paths, new, strict=True) if is_new]
            ):
                if self.output_format == "both":
                    self.write_part(found)
                _note(states, pa.Table.from_pylist(found, RESULT_SCHEMA))
        states[(states == ANSWERED) & ~listed] = FAILED

    def discard(self, rows: NDArray[np.bool_]) -> None:
        """Take rows of the split that will be generated again out of the Parquet parts, by a mask."""
        if rows.any():
            for _ in map_ahead(lambda name: self._take_out(name, rows), self._parts()):
                pass
            if self.is_grouped:  # what was written before there were groups is not written over
                for path in self._list():
                    if path.endswith(_OUT) and _select(rows, pa.array([_sample_id(path)])).any():
                        self._forget(_sample_id(path))

    def _take_out(self, name: str, rows: NDArray[np.bool_]) -> None:
        names = self._read_part(name, ["sample_id"])["sample_id"]
        gone = _select(rows, names)
        if gone.all():
            self.delete(f"{_PARTS}/{name}")
        elif gone.any():
            self._write_table(f"{_PARTS}/{name}", self._read_part(name).filter(pa.array(~gone)))

    def _forget(self, sample_id: str) -> None:
        for place in {"", _group(sample_id)}:
            paths = [f"{place}{sample_id}{kind}" for kind in (_OUT, _IN)]
            for path in paths + self._images(place, sample_id):
                self.delete(path)

    def note_images(self, stamps: Mapping[str, str]) -> set[str]:
        """Record which image files samples are asked with, and take out what was answered about others.

        Args:
            stamps: Sample id to what changes when the file is replaced.

        Returns:
            The samples whose images were replaced.
        """
        earlier = self.read_json(_STAMPS, _CURE) or {} if stamps else {}
        replaced = {name for name, stamp in stamps.items() if earlier.get(name, stamp) != stamp}
        if replaced:
            rows = row_indices(pa.array(sorted(replaced)))
            self.discard(np.bincount(rows, minlength=1).astype(np.bool_))
            for name in sorted(replaced):
                self._forget(name)
        if stamps.items() - earlier.items():
            self.write_json(_STAMPS, {**earlier, **stamps})
        return replaced

    def rows(
        self, columns: Sequence[str] | None = None, *, sample_ids: Collection[str] | None = None
    ) -> list[Row]:
        """Read result rows; the arguments are those of `scan`."""
        return self.read_results(columns, sample_ids=sample_ids).to_pylist()

    def answered(self, sample_ids: Sequence[str]) -> dict[str, Row]:
        """Read the answers of a few samples that are here, of a chunk that is written; failed ones not."""
        if self.output_format == "parquet":
            rows = self.rows(sample_ids=sample_ids)
        else:
            paths = (f"{self.place(name)}{name}{_OUT}" for name in sample_ids)
            there = [path for path in paths if self.has(path)]
            rows = [row for part in self._read_out_files(there) for row in part]
        return {row["sample_id"]: row for row in rows if row["error"] is None}

    def read_results(
        self, columns: Sequence[str] | None = None, *, sample_ids: Collection[str] | None = None
    ) -> pa.Table:
        """Read result rows into one table; the arguments are those of `scan`."""
        tables = list(self.scan(columns, sample_ids=sample_ids))
        return pa.concat_tables(tables) if tables else _schema(columns).empty_table()

    def scan(
        self, columns: Sequence[str] | None = None, *, sample_ids: Collection[str] | None = None
    ) -> Iterator[pa.Table]:
        """Read result rows a part at a time, from Parquet where there is any, else from the files.

        Args:
            columns: Columns of `RESULT_SCHEMA`; all without.
            sample_ids: Samples to read, where they are there; all without.
        """
        wanted = _schema(columns)
        if self.output_format == "files":
            only = None if sample_ids is None else frozenset(sample_ids)
            for paths in self._answers():
                for rows in self._read_out_files([p for p in paths if only is None or _sample_id(p) in only]):
                    yield pa.Table.from_pylist(rows, wanted)
            return
        names = None if sample_ids is None else pa.array(sorted(sample_ids), pa.string())
        yield from map_ahead(lambda part: self._read_rows(part, wanted.names, names), self._parts())

    def _read_rows(self, part: str, columns: list[str], sample_ids: pa.Array | None) -> pa.Table:
        if sample_ids is None:
            return self._read_part(part, columns)
        found = pc.is_in(self._read_part(part, ["sample_id"])["sample_id"], sample_ids)
        if not pc.any(found).as_py():
            return _schema(columns).empty_table()
        return self._read_part(part, columns).filter(found)

    def read_images(self, sample_id: str) -> list[bytes]:
        """Return a sample's images as they were written."""
        places = (_group(sample_id), "") if self.is_grouped else ("",)
        found = (self._images(place, sample_id) for place in places)
        return next(([self._read(name) for name in names] for names in found if names), [])

    def _images(self, place: str, sample_id: str) -> list[str]:
        return list(takewhile(self.has, image_names(f"{place}{sample_id}")))

    def place(self, sample_id: str) -> str:
        """Return the subfolder that a sample's files are written into, with a slash, or nothing."""
        return _group(sample_id) if self.is_grouped else ""

    def written(self) -> list[str]:
        """Name the files of samples and the Parquet parts."""
        files = [path for paths in self._files() for path in paths if _SAMPLE_FILE.fullmatch(_name(path))]
        others = [name for name in (_STAMPS, BATCH_OUTPUT) if self.has(name)]
        return files + others + [f"{_PARTS}/{name}" for name in self._parts()]

    def has_results(self) -> bool:
        """Whether any sample was ever finished here."""
        return bool(self._parts()) or any(self._answers())

    def clear(self) -> None:
        """Delete what earlier runs wrote, and nothing else that may lie in the folder."""
        super(ResultFolder, self).clear()
        for folder in (*self._groups(), _GROUPS):
            if not self._list(folder) and not self._list(folder, folders=True):
                self.delete(folder)

    def _files(self) -> Iterator[list[str]]:
        """List the files of samples, a folder at a time."""
        for folder in ("", *self._groups()):
            yield [f"{folder}/{name}".lstrip("/") for name in self._list(folder)]

    def _groups(self) -> list[str]:
        return [f"{_GROUPS}/{name}" for name in self._list(_GROUPS, folders=True)]

    def _answers(self) -> Iterator[list[str]]:
        """List the `_out.json` files, a folder at a time."""
        for paths in self._files():
            if answers := [path for path in paths if path.endswith(_OUT)]:
                yield answers

    def _parts(self) -> list[str]:
        return [name for name in self._list(_PARTS) if _PART_FILE.fullmatch(name)]

    def _read_out_files(self, paths: Sequence[str]) -> Iterator[list[Row]]:
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for start in range(0, len(paths), _ROWS_PER_READ):
                yield list(pool.map(self._read_out_file, paths[start : start + _ROWS_PER_READ]))

    def _read_out_file(self, path: str) -> Row:
        sample_id = _sample_id(path)
        row = self.read_json(path, _CURE) or {}
        if row.get("sample_id") != sample_id or "error" not in row:
            raise ValueError(self._damaged(path, f"no result of {sample_id} in it", _CURE))
        return cast(Row, row)

    def _read_part(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        wanted, data = _schema(columns), self._read(f"{_PARTS}/{name}")
        try:
            part = pq.ParquetFile(pa.BufferReader(data))
            table = part.read([each for each in wanted.names if each in part.schema_arrow.names])
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(self._damaged(f"{_PARTS}/{name}", error, _CURE)) from error
        return pa.concat_tables([wanted.empty_table(), table], promote_options="default")

    def _write_table(self, name: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        self.write_bytes(name, sink.getvalue().to_pybytes())


def save_sample_outputs(
    folder: ResultFolder, row: Row, asked: dict[str, Any], images: Sequence[bytes | None] = ()
) -> None:
    """Write one sample's files: `_in.json`, its images, and last `_out.json`, which marks it finished.

    Args:
        folder: Where to write.
        row: Result row (`RESULT_SCHEMA`).
        asked: What was asked: question, messages, answers and their source.
        images: JPEG of each image; None for one that has none.
    """
    path = folder.place(row["sample_id"]) + row["sample_id"]
    for name, image in zip(image_names(path), images, strict=False):
        if image is not None:
            folder.write_bytes(name, image)
    folder.write_json(f"{path}{_IN}", asked)
    folder.write_json(f"{path}{_OUT}", pick(row, RESULT_SCHEMA.names))


def image_names(sample_id: str) -> Iterator[str]:
    """Name the files of a sample's images, without end."""
    return (f"{sample_id}_img.jpg" if n == 1 else f"{sample_id}_img_{n}.jpg" for n in count(1))


def pick(row: Row, columns: Sequence[str]) -> Row:
    """Return some columns of a row, None where it lacks one."""
    return cast(Row, {name: row.get(name) for name in columns})


def _schema(columns: Sequence[str] | None) -> pa.Schema:
    return RESULT_SCHEMA if columns is None else pa.schema([RESULT_SCHEMA.field(name) for name in columns])


def _name(path: str) -> str:
    return PurePosixPath(path).name


def _sample_id(path: str) -> str:
    return _name(path).removesuffix(_OUT)


def _group(sample_id: str) -> str:
    """Return the subfolder of a sample's group."""
    (row,) = row_indices(pa.array([sample_id]))
    return f"{_GROUPS}/{max(0, row) // _GROUP_SIZE:06d}/"


def _note(states: NDArray[np.int8], table: pa.Table) -> None:
    rows = row_indices(table["sample_id"])
    known = (rows >= 0) & (rows < len(states))
    answered = pc.is_null(table["error"]).to_numpy()
    states[rows[known]] = np.where(answered, ANSWERED, FAILED)[known]


def _select(mask: NDArray[np.bool_], sample_ids: pa.Array) -> NDArray[np.bool_]:
    """Tell which samples a mask of rows has."""
    rows = row_indices(sample_ids)
    known = (rows >= 0) & (rows < len(mask))
    return known & mask[np.where(known, rows, 0)]
