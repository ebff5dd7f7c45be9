"""Where results land: per-sample files and Parquet in one folder, atomic and resumable.

    options.json                     what the answers depend on; a folder is resumed only if it agrees
    {sample_id}_in.json, _img.jpg    what was asked
    {sample_id}_out.json             what was answered, written after the two above
    predictions/part-*.parquet       the same rows; a sample is in one part at most
    report.html, run.json            written last: run.json is there exactly when the run completed

Every file appears whole or not at all, so a run that is killed anywhere leaves a folder that resumes.
The folder may be local or behind any URI that pyarrow opens (s3://, gs://, ...). No Ray here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem, copy_files

from vlmray.errors import one_line
from vlmray.schema import Row

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

_OPTIONS, _RUN, _REPORT, _PARTS = "options.json", "run.json", "report.html", "predictions"
_OUT = "_out.json"
_FINGERPRINTS = {
    "model_fingerprint": ("weights", "model_id"),
    "adapter_fingerprint": ("weights", "adapter"),
    "dataset_fingerprint": ("data", "dataset_name"),
}
"""Options that say what a name stood for: of what, and the option that is the name."""
_SAMPLE_FILE = re.compile(r".+-\d{6,}(_in\.json|_img\.jpg|_out\.json)")
_PART_FILE = re.compile(r"part-.+\.parquet")
# Uploads to an object store appear when they are complete; elsewhere a rename makes it so.
_ATOMIC_FILESYSTEMS = ("s3", "gcs", "abfs")
_NUM_THREADS = 16


@dataclass(frozen=True, slots=True)
class OutputDirectory:
    """A folder of results. Pickles as its URI, so that tasks on any node can write to it."""

    uri: str
    output_format: str = "both"

    @property
    def is_local(self) -> bool:
        """Whether it lies on one machine's disk rather than where every node can write."""
        return "://" not in self.uri or self.uri.startswith("file://")

    @classmethod
    def create(cls, output_dir: str, output_format: str = "both") -> OutputDirectory:
        """Make the folder, or open it where it is there.

        Raises:
            ValueError: it cannot be made.
        """
        folder = cls(_absolute(output_dir), output_format)
        with _naming_the_folder(output_dir):
            filesystem, root = open_filesystem(folder.uri)
            filesystem.create_dir(root, recursive=True)
        return folder

    def write_options(self, options: Mapping[str, Any]) -> None:
        """Record what a run depends on.

        Raises:
            ValueError: the folder takes no files.
        """
        with _naming_the_folder(self.uri):
            self.write_text(_OPTIONS, _json(options))

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Check that the run in here had these options.

        Raises:
            ValueError: it had others, or there is none.
        """
        found = self.read_options()
        if found is None:
            raise ValueError(f"--output_dir {self.uri} holds no run to go on with; leave out --resume")
        _check_same(self.uri, found, json.loads(_json(options)))

    def save(self, rows: Sequence[Row], inputs: Sequence[Row], images: Sequence[bytes | None]) -> None:
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
            rows = self.read_results(["sample_id", "error"]).to_pylist()
            answered = {row["sample_id"]: row["error"] is None for row in rows}
        if self.output_format != "parquet":
            listed = set(self._sample_ids())
            answered = {sample_id: answered[sample_id] and sample_id in listed for sample_id in answered}
            with ThreadPoolExecutor(_NUM_THREADS) as pool:
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
                self._delete(f"{_PARTS}/{name}")

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
            with ThreadPoolExecutor(_NUM_THREADS) as pool:
                rows = pool.map(self._read_out_file, sorted(names))
                return pa.Table.from_pylist([{c: row.get(c) for c in wanted.names} for row in rows], wanted)
        only = None if sample_ids is None else pa.array(sorted(sample_ids), pa.string())

        def read(name: str) -> pa.Table:
            table = self._read_part(name, wanted.names)
            return table if only is None else table.filter(pc.is_in(table["sample_id"], only))

        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            tables = list(pool.map(read, self._parts()))
        return pa.concat_tables(tables) if tables else wanted.empty_table()

    def read_image(self, sample_id: str) -> bytes | None:
        """Return a sample's `_img.jpg`, or None where there is none."""
        try:
            return self._read(f"{sample_id}_img.jpg")
        except FileNotFoundError:
            return None

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, atomically."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file so that it appears whole or not at all."""
        filesystem, root = open_filesystem(self.uri)
        path = f"{root}/{name}"
        atomic = filesystem.type_name in _ATOMIC_FILESYSTEMS
        target = path if atomic else f"{root}/.{name.replace('/', '-')}-{uuid.uuid4().hex}.tmp"
        with filesystem.open_output_stream(target) as stream:
            stream.write(data)
        if not atomic:
            filesystem.move(target, path)

    def write_folder(self, name: str, source: Path) -> None:
        """Copy a local folder so that it appears whole, in place of what was there under the name.

        In an object store, which has no folders, only each of its files does.
        """
        self.remove_leftovers(re.escape(name))
        filesystem, root = open_filesystem(self.uri)
        atomic = filesystem.type_name in _ATOMIC_FILESYSTEMS
        target = f"{root}/{name}" if atomic else f"{root}/.{name}-{uuid.uuid4().hex}.tmp"
        if atomic:
            self.delete_folder(name)
        filesystem.create_dir(target, recursive=True)
        copy_files(
            str(source), target, source_filesystem=LocalFileSystem(), destination_filesystem=filesystem
        )
        if not atomic:
            self.delete_folder(name)
            filesystem.move(target, f"{root}/{name}")

    def delete_folder(self, name: str) -> None:
        """Delete a folder in here with all it holds, if it is there."""
        filesystem, root = open_filesystem(self.uri)
        if filesystem.get_file_info(f"{root}/{name}").type == FileType.Directory:
            filesystem.delete_dir(f"{root}/{name}")

    def has(self, name: str) -> bool:
        """Tell whether a file or folder of this name is in here."""
        filesystem, root = open_filesystem(self.uri)
        return bool(filesystem.get_file_info(f"{root}/{name}").type != FileType.NotFound)

    def reopen(self) -> None:
        """Mark the folder as holding an unfinished run."""
        self._delete(_RUN)

    def finish(self, run: Mapping[str, Any], report: str) -> None:
        """Write the report and, last, the manifest that says the run completed."""
        self.write_text(_REPORT, report)
        self.write_text(_RUN, _json(run))

    def clear(self) -> None:
        """Delete what earlier runs wrote, and nothing else that may lie in the folder."""
        self.reopen()
        names = [name for name in self._list("") if _SAMPLE_FILE.fullmatch(name)]
        parts = [f"{_PARTS}/{name}" for name in self._parts()]
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            list(pool.map(self._delete, [*names, *parts, _REPORT]))

    def remove_leftovers(self, names: str = ".+") -> None:
        """Delete the half-written files and folders of a run that was killed; `names` is a pattern."""
        filesystem, root = open_filesystem(self.uri)
        temporary = re.compile(rf"\.{names}-[0-9a-f]{{32}}\.tmp")
        for info in filesystem.get_file_info(FileSelector(root, allow_not_found=True)):
            if temporary.fullmatch(info.base_name):
                (filesystem.delete_file if info.is_file else filesystem.delete_dir)(info.path)

    def read_options(self) -> dict[str, Any] | None:
        """Return the options of the run that wrote here, or None in a new folder."""
        try:
            return self._read_json(_OPTIONS)
        except FileNotFoundError:
            return None

    def has_results(self) -> bool:
        """Whether any sample was ever finished here."""
        return bool(self._sample_ids() or self._parts())

    def _sample_ids(self) -> list[str]:
        """List the samples that have an `_out.json`."""
        return [name.removesuffix(_OUT) for name in self._list("") if name.endswith(_OUT)]

    def _parts(self) -> list[str]:
        return [name for name in self._list(_PARTS) if _PART_FILE.fullmatch(name)]

    def _read_out_file(self, sample_id: str) -> Row:
        row = self._read_json(f"{sample_id}{_OUT}")
        if row.get("sample_id") != sample_id or "error" not in row:
            raise ValueError(self._damaged(f"{sample_id}{_OUT}", f"no result of {sample_id} in it"))
        return row

    def _read_json(self, name: str) -> dict[str, Any]:
        data = self._read(name)
        try:
            value = json.loads(data)
        except ValueError as error:
            raise ValueError(self._damaged(name, f"not JSON: {error}")) from error
        if not isinstance(value, dict):
            raise ValueError(self._damaged(name, f"a {type(value).__name__} instead of an object"))
        return value

    def _damaged(self, name: str, problem: object) -> str:
        cure = "choose another folder" if name == _OPTIONS else "delete it to have its samples answered again"
        return f"--output_dir: {self.uri}/{name} is damaged ({problem}); {cure}"

    def _read_part(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        data = self._read(f"{_PARTS}/{name}")
        try:
            return pq.read_table(pa.BufferReader(data), columns=columns)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(self._damaged(f"{_PARTS}/{name}", error)) from error

    def _write_table(self, name: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        self.write_bytes(name, sink.getvalue().to_pybytes())

    def _read(self, name: str) -> bytes:
        filesystem, root = open_filesystem(self.uri)
        with filesystem.open_input_file(f"{root}/{name}") as file:
            return bytes(file.read())

    def _delete(self, name: str) -> None:
        filesystem, root = open_filesystem(self.uri)
        if filesystem.get_file_info(f"{root}/{name}").type == FileType.File:
            filesystem.delete_file(f"{root}/{name}")

    def _list(self, folder: str) -> list[str]:
        filesystem, root = open_filesystem(self.uri)
        selector = FileSelector(f"{root}/{folder}".rstrip("/"), allow_not_found=True)
        names = (info.base_name for info in filesystem.get_file_info(selector) if info.is_file)
        return sorted(name for name in names if not name.startswith("."))


def prepare_output_directory(
    output_dir: str, options: Mapping[str, Any], *, output_format: str = "both", overwrite: bool = False
) -> OutputDirectory:
    """Create the output folder, or open the one that an earlier run with these options left.

    Args:
        output_dir: Local folder or URI.
        options: Everything the answers depend on (model, prompt, ...), as JSON values.
        output_format: "files", "parquet" or "both".
        overwrite: Delete the earlier run's results instead of resuming it.

    Raises:
        ValueError: the folder cannot be written, or holds answers of other options; says which.
    """
    folder = OutputDirectory(_absolute(output_dir), output_format)
    options = json.loads(_json(options))
    with _naming_the_folder(output_dir):
        filesystem, root = open_filesystem(folder.uri)
        filesystem.create_dir(root if output_format == "files" else f"{root}/{_PARTS}", recursive=True)
        found = folder.read_options()
        has_results = folder.has_results()
        if found is None and has_results:
            raise ValueError(
                f"--output_dir {output_dir} holds results but no {_OPTIONS} that says what they are of; "
                "choose another folder"
            )
        if found is not None:
            unfinished = not has_results and found.get("job") == options.get("job")
            if overwrite or unfinished:
                folder.clear()  # a run that ended before its first result binds nobody to its options
            else:
                _check_same(output_dir, found, options)
        folder.remove_leftovers()
        folder.write_text(_OPTIONS, _json(options))  # written again, to see that the folder takes files
    return folder


def save_sample_outputs(folder: OutputDirectory, row: Row, asked: Row, image: bytes | None = None) -> None:
    """Write one sample's files: `_in.json`, `_img.jpg`, and last `_out.json`, which marks it finished.

    Args:
        folder: Where to write.
        row: Result row (`RESULT_SCHEMA`).
        asked: What was asked: question, messages, answers and their source.
        image: JPEG bytes, or None.
    """
    sample_id = row["sample_id"]
    if image is not None:
        folder.write_bytes(f"{sample_id}_img.jpg", image)
    folder.write_text(f"{sample_id}_in.json", _json(asked))
    folder.write_text(f"{sample_id}_out.json", _json({name: row.get(name) for name in RESULT_SCHEMA.names}))


@contextlib.contextmanager
def _naming_the_folder(output_dir: str) -> Iterator[None]:
    """Turn what a file system raises into a mistake in --output_dir."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        reason = one_line(error, 1000)
        raise ValueError(f"--output_dir {output_dir} cannot be written: {reason}") from error


def _check_same(output_dir: str, found: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Check that two runs have the same options; one that is not there counts as None.

    What lies behind a name is spoken of where the name itself is the same.
    """
    changed = sorted(name for name in found.keys() | options.keys() if found.get(name) != options.get(name))
    if not changed:
        return
    changed = ["job"] if "job" in changed else changed
    details = [
        f"{name} was {found.get(name)!r}, now {options.get(name)!r}"
        for name in changed
        if name not in _FINGERPRINTS
    ]
    problem = "holds another run"
    if not details and "dataset_fingerprint" not in found:
        problem = "was written by an earlier version of vlmray"
        details = ["it did not record what tells whether weights and dataset have changed since"]
    for name in () if details else changed:
        what, option = _FINGERPRINTS[name]
        details.append(
            f"the {what} of {option} {options.get(option)!r} changed: "
            f"fingerprint was {found.get(name)!r}, now {options.get(name)!r}"
        )
    raise ValueError(
        f"--output_dir {output_dir} {problem} ({'; '.join(details)}); "
        "choose another folder, or pass --overwrite to delete it"
    )


def _absolute(output_dir: str) -> str:
    return output_dir.rstrip("/") if "://" in output_dir else str(Path(output_dir).expanduser().resolve())


def open_filesystem(uri: str) -> tuple[FileSystem, str]:
    """Return the filesystem of a folder or URI, and the path in it."""
    if "://" not in uri:
        return LocalFileSystem(), uri
    filesystem, path = FileSystem.from_uri(uri)
    return filesystem, path.rstrip("/")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
