"""Parquet files behind a URI, read where the rows are needed."""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from vlmray.dataset.huggingface import HFSource, name_classes
from vlmray.dataset.text.values import to_rows
from vlmray.errors import OptionError, one_line
from vlmray.storage.cache import cache_folder
from vlmray.storage.fingerprints import digest

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.fs import FileInfo, FileSystem


class ParquetSource:
    """Parquet files behind a URI, read where the rows are needed and never through the driver."""

    on_driver = False
    same_image_column = None
    base_dir = None

    def __init__(self, uri: str, split: str) -> None:
        infos = {info.path: info for info in _list_parquet(uri)}
        files = _files_of_split(sorted(infos), uri, split)
        with ThreadPoolExecutor(16) as pool:
            footers = list(pool.map(functools.partial(_read_footer, uri), files))
        schemas = [footer.schema.to_arrow_schema() for footer in footers]
        for file, schema in zip(files, schemas, strict=True):
            _check_alike(uri, schema, file, schemas[0], files[0])
        self.column_names = list(schemas[0].names)
        self._uri = uri
        self._files = files
        self._class_names = _class_names(schemas[0])
        self._row_groups = [
            (file, group) for file, footer in zip(files, footers, strict=True)
            for group in range(footer.num_row_groups)
        ]  # fmt: skip
        root = _filesystem(uri)[1].rstrip("/")
        self._filled = _count_filled(footers) if self._row_groups else {}
        self._fingerprint = digest(
            *(
                (file.removeprefix(root), infos[file].size, infos[file].mtime_ns, _digest_footer(footer))
                for file, footer in zip(files, footers, strict=True)
            )
        )
        self._starts = [0]
        for footer in footers:
            for group in range(footer.num_row_groups):
                self._starts.append(self._starts[-1] + footer.row_group(group).num_rows)

    def __len__(self) -> int:
        return self._starts[-1]

    def fingerprint(self) -> str:
        """Return 16 hex digits of the split's files: their names, sizes, times of change and footers.

        Footers, with the sizes and bounds of all columns, tell more than nothing where a hub has no times.
        """
        return self._fingerprint

    def count_filled(self, column: str) -> int | None:
        """Count the rows that have a value in a column, where the footers tell."""
        return self._filled.get(column)

    def copy_here(self) -> HFSource:
        """Copy the split's files to this machine, where `datasets` maps them into memory."""
        import datasets
        from pyarrow.fs import LocalFileSystem, copy_files

        filesystem, _ = _filesystem(self._uri)
        infos = filesystem.get_file_info(self._files)
        identity = json.dumps([[self._uri, info.path, info.size, str(info.mtime)] for info in infos])
        folder = cache_folder() / "datasets" / hashlib.sha256(identity.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        local = [folder / f"{number:05d}.parquet" for number in range(len(infos))]
        for file, info in zip(local, infos, strict=True):
            if not file.is_file():
                part = file.with_suffix(f".{os.getpid()}.part")
                copy_files(
                    info.path,
                    str(part),
                    source_filesystem=filesystem,
                    destination_filesystem=LocalFileSystem(),
                )
                part.rename(file)
        datasets.disable_progress_bars()
        copied = datasets.load_dataset("parquet", data_files=list(map(str, local)), split="train")
        return HFSource(copied, fingerprint=self._fingerprint)

    def read(self, indices: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Read rows, a row group at a time."""
        names = None if columns is None else tuple(columns)
        return [self._read_row(index, names) for index in indices]

    def _read_row(self, index: int, columns: tuple[str, ...] | None) -> dict[str, Any]:
        position = bisect.bisect_right(self._starts, index) - 1
        row_group = _read_row_group(self._uri, *self._row_groups[position], columns)
        (row,) = to_rows(row_group.slice(index - self._starts[position], 1))
        row = {name: row[name] for name in columns or self.column_names}  # files may differ in their order
        return name_classes(row, self._class_names)


def _check_alike(uri: str, schema: pa.Schema, file: str, first_schema: pa.Schema, first: str) -> None:
    """Check that a file has the columns of the first one, in any order."""
    import pyarrow as pa

    if set(schema.names) != set(first_schema.names):
        raise OptionError(
            "dataset_name",
            f"{uri}: {file} has columns {', '.join(schema.names)}, but {first} has "
            f"{', '.join(first_schema.names)}",
        )
    for field in schema:
        kind, expected = field.type, first_schema.field(field.name).type
        if not kind.equals(expected) and len({_family(kind), _family(expected), pa.null()}) > 2:
            raise OptionError(
                "dataset_name",
                f"{uri}: column {field.name!r} of {file} is {kind}, but that of {first} is {expected}",
            )


def _family(kind: pa.DataType) -> object:
    """Return what types have in common whose values are read alike."""
    import pyarrow.types as types

    if types.is_integer(kind) or types.is_floating(kind):
        return "number"
    texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_dictionary)
    if any(is_text(kind) for is_text in texts):
        return "text"
    if types.is_binary(kind) or types.is_large_binary(kind):
        return "binary"
    return kind if types.is_primitive(kind) or types.is_null(kind) else type(kind)


def _count_filled(footers: Sequence[pa.parquet.FileMetaData]) -> dict[str, int]:
    """Count the rows that have a value, by column; of a structure, in its fullest field."""
    groups = [footer.row_group(at) for footer in footers for at in range(footer.num_row_groups)]
    counts = [_count_group(group) for group in groups]
    return {name: sum(count[name] for count in counts) for name in set(counts[0]).intersection(*counts)}


def _count_group(group: pa.parquet.RowGroupMetaData) -> dict[str, int]:
    counts: dict[str, int] = {}
    for chunk in map(group.column, range(group.num_columns)):
        name, _, inner = chunk.path_in_schema.partition(".")
        known = chunk.statistics is not None and chunk.statistics.has_null_count
        if known and "." not in inner:  # otherwise it is in a list
            counts[name] = max(counts.get(name, 0), chunk.num_values - chunk.statistics.null_count)
    return counts


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Read the names of the classes, where `datasets` noted them in a Parquet file."""
    notes = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = notes.get("info", {}).get("features", {})
    inner = {
        name: feature.get("feature", feature)
        for name, feature in features.items()
        if isinstance(feature, dict)
    }
    return {name: feature["names"] for name, feature in inner.items() if feature.get("_type") == "ClassLabel"}


def _filesystem(uri: str) -> tuple[FileSystem, str]:
    from pyarrow.fs import FileSystem

    try:
        filesystem, path = FileSystem.from_uri(uri)
    except (ValueError, OSError, ImportError) as error:
        raise OptionError("dataset_name", f"{uri} cannot be opened: {one_line(error)}") from error
    return filesystem, path


def _list_parquet(uri: str) -> list[FileInfo]:
    """List the Parquet files at a URI."""
    from pyarrow.fs import FileSelector, FileType

    filesystem, path = _filesystem(uri)
    try:
        info = filesystem.get_file_info(path)
        infos = (
            filesystem.get_file_info(FileSelector(path, recursive=True))
            if info.type == FileType.Directory
            else [info]
        )
    except OSError as error:
        raise OptionError("dataset_name", f"{uri} cannot be listed: {one_line(error)}") from error
    files = [info for info in infos if info.is_file and info.path.endswith(".parquet")]
    if not files:
        raise OptionError("dataset_name", f"{uri}: no Parquet file there")
    return files


def _files_of_split(files: list[str], uri: str, split: str) -> list[str]:
    """Keep the files of a split, told by file or folder name; files without any split name all count."""
    if files == [_filesystem(uri)[1]]:
        return files  # the URI names a file, not a folder
    known = ("train", "validation", "valid", "val", "dev", "test", split)
    by_split: dict[str, list[str]] = {}
    for file in files:
        folder, name = file.split("/")[-2:]
        found = next((word for word in known if name.startswith((f"{word}-", f"{word}."))), None)
        by_split.setdefault(found or (folder if folder in known else ""), []).append(file)
    if set(by_split) == {""}:
        return files
    if split not in by_split:
        found_splits = ", ".join(sorted(filter(None, by_split)))
        raise OptionError("dataset_split", f"{split!r}: {uri} has {found_splits}")
    return by_split[split]


def _read_footer(uri: str, path: str) -> pa.parquet.FileMetaData:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path, filesystem=_filesystem(uri)[0])
    except (OSError, pa.ArrowInvalid) as error:
        raise OptionError("dataset_name", f"{uri}: {path} cannot be read: {one_line(error)}") from error


def _digest_footer(footer: pa.parquet.FileMetaData) -> str:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    footer.write_metadata_file(sink)
    return digest(sink.getvalue().to_pybytes())


@functools.lru_cache(maxsize=1)
def _read_row_group(uri: str, path: str, group: int, columns: tuple[str, ...] | None) -> pa.Table:
    """Read one row group of a file; neighbouring rows are read together, so the last one is kept."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, filesystem=_filesystem(uri)[0]) as file:
        return file.read_row_group(group, columns=None if columns is None else list(columns))
