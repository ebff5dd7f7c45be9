"""Result rows in a run's folder: files of each sample and Parquet, atomic and resumable.

    {sample_id}_in.json, _img.jpg    what was asked
    {sample_id}_out.json             what was answered, written after the two above
    images.json                      sizes and times of the image files that rows name by path
    predictions/part-*.parquet       the same rows; a sample is in one part at most

No Ray here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlmray.schema import Row
from vlmray.storage.run_folder import NUM_THREADS, RunFolder

RESULT_SCHEMA = pa.schema(
    {
        "sample_id": pa.string(),
        "row_index": pa.int64(),
        "question": pa.string(),
        "choices": pa.list_(pa.string()),
        "answers": pa.list_(pa.string()),
        "family": pa.string(),
        "prompt": pa.string(),
        "prediction": pa.string(),
        "metric": pa.string(),
        "score": pa.float64(),
        "num_prompt_tokens": pa.int32(),
        "num_completion_tokens": pa.int32(),
        "finish_reason": pa.string(),
        "error": pa.string(),
    }
)
"""Columns of a result row, in `_out.json` and in Parquet alike."""

_PARTS, _STAMPS = "predictions", "images.json"
_IN, _OUT, _IMAGE = "_in.json", "_out.json", "_img.jpg"
_SAMPLE_FILE = re.compile(r".+-\d{6,}(_in\.json|_img\.jpg|_out\.json)")
_PART_FILE = re.compile(r"part-.+\.parquet")
_CURE = "delete it to have its samples answered again"


@dataclass(frozen=True, slots=True)
class ResultFolder(RunFolder):
    """A folder of result rows."""

    output_format: str = "both"
    """`files`, `parquet` or `both`."""

    def save(
        self, rows: Sequence[Row], inputs: Sequence[dict[str, Any]], images: Sequence[bytes | None]
    ) -> None:
        """Write finished rows, files first: whatever has an `_out.json` is never generated again.

        Args:
            rows: Result rows (`RESULT_SCHEMA`).
            inputs: What `_in.json` records, one for each row.
            images: JPEG bytes, or None for a row without an image.
        """
        if self.output_format != "parquet":
            for row, asked, image in zip(rows, inputs, images, strict=True):
                save_sample_outputs(self, row, asked, image)
        if self.output_format != "files":
            self.write_part(rows)

    def write_part(self, rows: Sequence[Row]) -> None:
        """Write rows as one Parquet part, named by its samples: writing it twice is writing it once."""
        names = [row["sample_id"] for row in rows]
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]
        self._write_table(
            f"{_PARTS}/part-{names[0]}-{digest}.parquet", pa.Table.from_pylist(rows, RESULT_SCHEMA)
        )

    def finished(self) -> dict[str, bool]:
        """Return what is here: sample id to whether it was answered; the others are tried again.

        Not answered are rows that failed, and rows whose `_out.json` somebody deleted. A run that died
        between a sample's files and its Parquet part left the files: the part is written now, so that
        both say the same.
        """
        answered: dict[str, bool] = {}
        if self.output_format != "files":
            answered = {row["sample_id"]: row["error"] is None for row in self.rows(("sample_id", "error"))}
        if self.output_format != "parquet":
            listed = set(self._sample_ids())
            answered = {sample_id: answered[sample_id] and sample_id in listed for sample_id in answered}
            with ThreadPoolExecutor(NUM_THREADS) as pool:
                found = list(pool.map(self._read_out_file, sorted(listed - answered.keys())))
            if found and self.output_format == "both":
                self.write_part(found)
            answered |= {row["sample_id"]: row["error"] is None for row in found}
        return answered

    def discard(self, sample_ids: Collection[str]) -> None:
        """Take rows that will be generated again out of the Parquet parts."""
        gone = pa.array(sorted(sample_ids), pa.string())
        for name in self._parts():
            table = self._read_part(name)
            kept = table.filter(pc.invert(pc.is_in(table["sample_id"], gone)))
            if kept.num_rows == table.num_rows:
                continue
            if kept.num_rows:
                self._write_table(f"{_PARTS}/{name}", kept)
            else:
                self.delete(f"{_PARTS}/{name}")

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
            self.discard(replaced)
            for name in sorted(replaced):
                self.delete(f"{name}{_OUT}")
        if stamps.items() - earlier.items():
            self.write_json(_STAMPS, {**earlier, **stamps})
        return replaced

    def rows(
        self, columns: Sequence[str] | None = None, *, sample_ids: Collection[str] | None = None
    ) -> list[Row]:
        """Read result rows; the arguments are those of `read_results`."""
        return self.read_results(columns, sample_ids=sample_ids).to_pylist()

    def read_results(
        self, columns: Sequence[str] | None = None, *, sample_ids: Collection[str] | None = None
    ) -> pa.Table:
        """Read result rows, from Parquet where there is any, else from the files.

        Args:
            columns: Columns of `RESULT_SCHEMA`; all without.
            sample_ids: Samples to read, where they are there; all without.
        """
        wanted = RESULT_SCHEMA if columns is None else pa.schema([RESULT_SCHEMA.field(c) for c in columns])
        if self.output_format == "files":
            names = set(self._sample_ids())
            names &= names if sample_ids is None else set(sample_ids)
            with ThreadPoolExecutor(NUM_THREADS) as pool:
                return pa.Table.from_pylist(list(pool.map(self._read_out_file, sorted(names))), wanted)
        only = None if sample_ids is None else pa.array(sorted(sample_ids), pa.string())

        def read(name: str) -> pa.Table:
            table = self._read_part(name, wanted.names)
            return table if only is None else table.filter(pc.is_in(table["sample_id"], only))

        with ThreadPoolExecutor(NUM_THREADS) as pool:
            tables = list(pool.map(read, self._parts()))
        return pa.concat_tables(tables) if tables else wanted.empty_table()

    def read_image(self, sample_id: str) -> bytes | None:
        """Return a sample's `_img.jpg`, or None where there is none."""
        try:
            return self._read(f"{sample_id}{_IMAGE}")
        except FileNotFoundError:
            return None

    def written(self) -> list[str]:
        """Name the files of samples and the Parquet parts."""
        files = [name for name in self._list() if _SAMPLE_FILE.fullmatch(name)]
        stamps = [_STAMPS] if self.has(_STAMPS) else []
        return files + stamps + [f"{_PARTS}/{name}" for name in self._parts()]

    def has_results(self) -> bool:
        """Whether any sample was ever finished here."""
        return bool(self._sample_ids() or self._parts())

    def _sample_ids(self) -> list[str]:
        """List the samples that have an `_out.json`."""
        return [name.removesuffix(_OUT) for name in self._list() if name.endswith(_OUT)]

    def _parts(self) -> list[str]:
        return [name for name in self._list(_PARTS) if _PART_FILE.fullmatch(name)]

    def _read_out_file(self, sample_id: str) -> Row:
        name = f"{sample_id}{_OUT}"
        row = self.read_json(name, _CURE) or {}
        if row.get("sample_id") != sample_id or "error" not in row:
            raise ValueError(self._damaged(name, f"no result of {sample_id} in it", _CURE))
        return cast(Row, row)

    def _read_part(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        data = self._read(f"{_PARTS}/{name}")
        try:
            return pq.read_table(pa.BufferReader(data), columns=columns)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(self._damaged(f"{_PARTS}/{name}", error, _CURE)) from error

    def _write_table(self, name: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        self.write_bytes(name, sink.getvalue().to_pybytes())


def save_sample_outputs(
    folder: ResultFolder, row: Row, asked: dict[str, Any], image: bytes | None = None
) -> None:
    """Write one sample's files: `_in.json`, `_img.jpg`, and last `_out.json`, which marks it finished.

    Args:
        folder: Where to write.
        row: Result row (`RESULT_SCHEMA`).
        asked: What was asked: question, messages, answers and their source.
        image: JPEG bytes, or None.
    """
    sample_id = row["sample_id"]
    if image is not None:
        folder.write_bytes(f"{sample_id}{_IMAGE}", image)
    folder.write_json(f"{sample_id}{_IN}", asked)
    folder.write_json(f"{sample_id}{_OUT}", pick(row, RESULT_SCHEMA.names))


def pick(row: Row, columns: Sequence[str]) -> Row:
    """Return some columns of a row, None where it lacks one."""
    return cast(Row, {name: row.get(name) for name in columns})
