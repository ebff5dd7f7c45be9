"""Where rows come from: a split of a dataset, addressed by row index.

Three kinds of source share one small interface: what the `datasets` library loads (hub, local folder
or file), Parquet behind a URI that any node reads, and the built-in charts. A source pickles to a few
hundred bytes, so it travels to the tasks that read, and none of them holds rows.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlmray.builtin.charts import ChartDataset, parse_charts_name
from vlmray.models.checks import cache_folder
from vlmray.storage import hub

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    from pyarrow.fs import FileSystem

_FILE_BUILDERS = {
    ".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow",
}  # fmt: skip
# How `datasets` begins to say that a configuration is needed, or is not one of those there are.
_CONFIG_ERRORS = ("Config name is missing", "BuilderConfig", "Couldn't find cache", "There are multiple")
_URI_SCHEMES = ("s3", "gs", "gcs", "hf", "abfs", "abfss", "hdfs", "file")


class Source(Protocol):
    """Rows of one split, addressed by index."""

    @property
    def column_names(self) -> Sequence[str]: ...

    @property
    def on_driver(self) -> bool:
        """Rows lie on the driver's machine, so only tasks on that machine can read them."""
        ...

    @property
    def base_dir(self) -> str | None:
        """Folder that relative image paths start from, where the source has one."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Return rows by index; an image is encoded bytes, a path or URL, or {"bytes", "path"} of both.

        Args:
            indices: Rows, in any order.
            columns: Columns to read, which spares the work of the others; all without.
        """
        ...


def open_source(
    dataset_name: str, split: str, config: str | None = None, *, random_access: bool = False
) -> Source:
    """Open a split of a dataset by name.

    Args:
        dataset_name: Name on the hub, local folder or file, URI of Parquet files, or `charts?...`.
        split: Split to open. A single file has no splits and takes any name.
        config: Configuration (subset) of the dataset, where it has several.
        random_access: Rows will be read in any order. Parquet behind a URI is then copied to this
            machine once: it gives out row groups, not rows.

    Raises:
        ValueError: the name, split or configuration is unknown, or the data cannot be read.
    """
    if "[" in split or "/" in split:
        raise ValueError(f"--dataset_split {split!r} is not a split name; rows are chosen by --sample_slices")
    is_charts = dataset_name.partition("?")[0] == "charts"
    is_uri = dataset_name.partition("://")[0] in _URI_SCHEMES
    path = Path(dataset_name).expanduser()
    if config is not None and (is_charts or is_uri or path.is_file()):
        raise ValueError(f"--dataset_config {config!r}: {dataset_name} has no configurations")
    if is_charts:
        return ChartsSource(dataset_name, split)
    if is_uri:
        remote = ParquetSource(dataset_name, split)
        return remote.copy_here() if random_access else remote
    base_dir = path.resolve().parent if path.is_file() else path.resolve() if path.is_dir() else None
    return HFSource(load_hf_dataset(dataset_name, split, config), base_dir)


def load_hf_dataset(dataset_name: str, split: str, config: str | None = None) -> datasets.Dataset:
    """Load a split with the `datasets` library: a hub name, a local folder or a local file.

    A hub name also works without the network, from the local caches.

    Raises:
        ValueError: nothing is there, the hub cannot be reached, the split or configuration is unknown,
            or the files cannot be read; the message names the option and what is there.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    # What goes wrong is raised as well, and a mistake should be one line.
    datasets.logging.set_verbosity(logging.CRITICAL)
    path = Path(dataset_name).expanduser()
    if path.exists():
        datasets.disable_progress_bars()
        load = functools.partial(_load_local, path, config)
    elif path.is_absolute() or dataset_name.startswith((".", "~")) or path.suffix in _FILE_BUILDERS:
        raise ValueError(f"--dataset_name {dataset_name}: no such file or folder")
    else:
        load = functools.partial(_load_from_hub, dataset_name, config)
    try:
        return load(split)
    except hub.HubUnavailableError:
        raise
    except (ValueError, KeyError) as error:
        raise ValueError(_explain(dataset_name, split, config, error)) from error
    except (OSError, DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"--dataset_name {dataset_name} cannot be read: {_one_line(cause)}") from error


def _load_local(path: Path, config: str | None, split: str) -> datasets.Dataset:
    import datasets

    if (path / "dataset_dict.json").is_file():  # written by DatasetDict.save_to_disk
        splits = datasets.load_from_disk(str(path))
        if split not in splits:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(splits)}.')
        return splits[split]
    if (path / "state.json").is_file():  # written by Dataset.save_to_disk
        return datasets.load_from_disk(str(path))
    if path.is_dir():
        return datasets.load_dataset(str(path), name=config, split=split)
    builder = _FILE_BUILDERS.get(path.suffix)
    if builder is None:
        raise ValueError(f"unknown file type {path.suffix!r}; known: {', '.join(_FILE_BUILDERS)}")
    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    return datasets.load_dataset(builder, data_files={split: str(path)}, split=split, **options)


def _load_from_hub(name: str, config: str | None, split: str) -> datasets.Dataset:
    import datasets

    try:
        hub.check_reachable(name, "dataset", option="--dataset_name")
    except hub.HubUnavailableError as unavailable:
        # The hub's own cache holds the repository's files; the cache of `datasets` what it made of them.
        snapshot = hub.cached_snapshot(name, "dataset")
        if snapshot is not None:
            return datasets.load_dataset(str(snapshot), name=config, split=split)
        try:
            with _offline():
                return datasets.load_dataset(name, name=config, split=split)
        except (ConnectionError, FileNotFoundError):
            raise unavailable from None
    return datasets.load_dataset(name, name=config, split=split)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keep `datasets` from asking a hub that did not answer: it would try for half a minute."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _explain(name: str, split: str, config: str | None, error: Exception) -> str:
    text = _one_line(error)
    if text.startswith("Unknown split"):
        known = text.partition("one of")[2].strip(" .[]").replace("'", "")
        return f"--dataset_split {split!r}: {name} has {known}"
    if text.startswith("Split name"):
        return f"--dataset_split {split!r}: {text}"
    if text.startswith(_CONFIG_ERRORS):
        return f"--dataset_config {config!r}: {text}"
    return f"--dataset_name {name} cannot be read: {text}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


class ChartsSource:
    """The built-in charts: drawn where they are read, so they lie nowhere."""

    column_names = ("image", "image_id", "question", "answers", "family")
    on_driver = False
    base_dir = None

    def __init__(self, name: str, split: str) -> None:
        try:
            self._charts = ChartDataset(parse_charts_name(name), split)
        except ValueError as error:
            option = "--dataset_split" if "split" in str(error) else "--dataset_name"
            raise ValueError(f"{option}: {error}") from error

    def __len__(self) -> int:
        return len(self._charts)

    def read(self, indices: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        charts = self._charts
        if columns is None or "image" in columns:
            rows = [dict(charts[index]) for index in indices]
        elif list(columns) == ["image_id"]:
            rows = [{"image_id": charts.image_id(index)} for index in indices]
        else:  # nothing has to be drawn
            rows = [{"image_id": charts.image_id(index), **charts.ask(index)} for index in indices]
        return [{name: row[name] for name in columns or row} for row in rows]


class HFSource:
    """A split that `datasets` loaded: memory-mapped on the driver's machine, pickled as its path."""

    on_driver = True

    def __init__(self, dataset: datasets.Dataset, base_dir: Path | None = None) -> None:
        # As Arrow nothing is decoded: no image (also in lists), and no audio in a column nobody asked for.
        self._dataset = dataset.with_format("arrow")
        self._class_names = {
            name: feature.names for name, feature in dataset.features.items() if hasattr(feature, "int2str")
        }
        self.column_names = list(dataset.column_names)
        self.base_dir = str(base_dir) if base_dir else None

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, indices: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        dataset = self._dataset if columns is None else self._dataset.select_columns(list(columns))
        return [_name_classes(row, self._class_names) for row in dataset[list(indices)].to_pylist()]


class ParquetSource:
    """Parquet files behind a URI, read where the rows are needed and never through the driver."""

    on_driver = False
    base_dir = None

    def __init__(self, uri: str, split: str) -> None:
        files = _files_of_split(_list_parquet(uri), uri, split)
        with ThreadPoolExecutor(16) as pool:
            footers = list(pool.map(functools.partial(_read_footer, uri), files))
        schemas = [footer.schema.to_arrow_schema() for footer in footers]
        for file, schema in zip(files, schemas, strict=True):
            if schema.names != schemas[0].names:
                raise ValueError(
                    f"--dataset_name {uri}: {file} has columns {', '.join(schema.names)}, "
                    f"but {files[0]} has {', '.join(schemas[0].names)}"
                )
        self.column_names = list(schemas[0].names)
        self._uri = uri
        self._files = files
        self._class_names = _class_names(schemas[0])
        self._row_groups = [
            (file, group) for file, footer in zip(files, footers, strict=True)
            for group in range(footer.num_row_groups)
        ]  # fmt: skip
        self._starts = [0]
        for footer in footers:
            for group in range(footer.num_row_groups):
                self._starts.append(self._starts[-1] + footer.row_group(group).num_rows)

    def __len__(self) -> int:
        return self._starts[-1]

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
        return HFSource(datasets.load_dataset("parquet", data_files=list(map(str, local)), split="train"))

    def read(self, indices: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        names = None if columns is None else tuple(columns)
        return [self._read_row(index, names) for index in indices]

    def _read_row(self, index: int, columns: tuple[str, ...] | None) -> dict[str, Any]:
        position = bisect.bisect_right(self._starts, index) - 1
        row_group = _read_row_group(self._uri, *self._row_groups[position], columns)
        row = row_group.slice(index - self._starts[position], 1).to_pylist()[0]
        return _name_classes(row, self._class_names)


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Read the names of the classes, where `datasets` noted them in a Parquet file."""
    notes = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = notes.get("info", {}).get("features", {})
    return {
        name: feature["names"]
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }


def _name_classes(row: dict[str, Any], class_names: dict[str, list[str]]) -> dict[str, Any]:
    """Replace class indices by their names; -1 and None mean no label."""
    for column in class_names.keys() & row.keys():
        names, value = class_names[column], row[column]
        row[column] = names[value] if value is not None and 0 <= value < len(names) else None
    return row


def _filesystem(uri: str) -> tuple[FileSystem, str]:
    from pyarrow.fs import FileSystem

    try:
        return FileSystem.from_uri(uri)
    except (ValueError, OSError, ImportError) as error:
        raise ValueError(f"--dataset_name {uri} cannot be opened: {_one_line(error)}") from error


def _list_parquet(uri: str) -> list[str]:
    """List the paths of the Parquet files at a URI, sorted."""
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
        raise ValueError(f"--dataset_name {uri} cannot be listed: {_one_line(error)}") from error
    files = sorted(info.path for info in infos if info.is_file and info.path.endswith(".parquet"))
    if not files:
        raise ValueError(f"--dataset_name {uri}: no Parquet file there")
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
        raise ValueError(f"--dataset_split {split!r}: {uri} has {found_splits}")
    return by_split[split]


def _read_footer(uri: str, path: str) -> pa.parquet.FileMetaData:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path, filesystem=_filesystem(uri)[0])
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"--dataset_name {uri}: {path} cannot be read: {_one_line(error)}") from error


@functools.lru_cache(maxsize=1)
def _read_row_group(uri: str, path: str, group: int, columns: tuple[str, ...] | None) -> pa.Table:
    """Read one row group of a file; neighbouring rows are read together, so the last one is kept."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, filesystem=_filesystem(uri)[0]) as file:
        return file.read_row_group(group, columns=None if columns is None else list(columns))
