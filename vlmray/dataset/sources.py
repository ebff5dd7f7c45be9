"""Where rows come from: a split of a dataset, addressed by row index.

Four kinds of source share one small interface: text files (CSV, TSV, JSON) of the hub or this machine, what
else the `datasets` library loads, Parquet behind a URI that any node reads, and the built-in charts. A
source pickles to a few hundred bytes, and where each row of a text file begins, so it travels to the tasks
that read, and none of them holds rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

from vlmray.builtin.charts import ChartsSource, parse_charts_name
from vlmray.dataset.huggingface import open_split, without_rows
from vlmray.dataset.parquet import ParquetSource
from vlmray.dataset.registry import DATASETS
from vlmray.errors import OptionError

_URI_SCHEMES = ("s3", "gs", "gcs", "hf", "abfs", "abfss", "hdfs", "file")
_TEXT_SUFFIXES = {".csv", ".tsv", ".jsonl", ".json"}
_LONGEST_NAME = 255


class Source(Protocol):
    """Rows of one split, addressed by index."""

    @property
    def column_names(self) -> Sequence[str]:
        """Names of all columns."""
        ...

    @property
    def on_driver(self) -> bool:
        """Rows lie on the driver's machine, so only tasks on that machine can read them."""
        ...

    @property
    def base_dir(self) -> str | None:
        """Folder that relative image paths start from, where the source has one."""
        ...

    @property
    def same_image_column(self) -> str | None:
        """Column whose values tell which rows have an image in common; None: the images themselves do."""
        ...

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """Return what changes when the rows do, found without reading them; not where they lie.

        Images that rows name by path, outside of the dataset's own folder, do not count: see
        `vlmray.dataset.images.stamp_images`.
        """
        ...

    def count_filled(self, column: str) -> int | None:
        """Count the rows of the split that have a value in a column; None where that has to be read."""
        ...

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
    source = _open(dataset_name, split, config, random_access)
    if not len(source):
        raise without_rows(dataset_name, split)
    return source


def _open(dataset_name: str, split: str, config: str | None, random_access: bool) -> Source:
    is_charts = _is_charts(dataset_name)
    is_uri = dataset_name.partition("://")[0] in _URI_SCHEMES
    path = Path(dataset_name).expanduser()
    if config is not None and (is_charts or is_uri or path.is_file()):
        raise OptionError("dataset_config", f"{config!r}: {dataset_name} has no configurations")
    if is_charts:
        return ChartsSource(dataset_name, split)
    if (text := _text_behind(dataset_name)) is not None:
        return _open(str(text), split, config, random_access)
    if is_uri:
        remote = ParquetSource(dataset_name, split)
        return remote.copy_here() if random_access else remote
    base_dir = path.absolute().parent if path.is_file() else path.resolve()
    is_local = path.exists()
    source = open_split(
        dataset_name, split, config, base_dir=base_dir if is_local else None, path=path if is_local else None
    )
    if path.is_file() and path.is_symlink():
        source.base_dir = str(_base_of_link(source, path, base_dir))
    return source


def _text_behind(uri: str) -> Path | None:
    """Return the local file or folder of text files, and no Parquet, that a file:// URI stands for."""
    if not uri.startswith("file:///"):
        return None
    path = Path(url2pathname(urlsplit(uri).path))
    suffixes = {file.suffix for file in ([path] if path.is_file() else path.rglob("*"))}
    return path if suffixes & _TEXT_SUFFIXES and ".parquet" not in suffixes else None


def _base_of_link(source: Source, path: Path, beside: Path) -> Path:
    """Tell whether images lie beside a link, as in the hub's cache, or beside the file that it leads to."""
    target = path.resolve().parent
    values = [value for row in source.read(range(min(8, len(source)))) for value in row.values()]
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    names = [name for name in names if isinstance(name, str) and 0 < len(name) < _LONGEST_NAME]
    found = [any((folder / name).is_file() for name in names) for folder in (beside, target)]
    return target if found == [False, True] else beside


def display_name(dataset_name: str, config: str | None = None) -> str:
    """Return what a dataset is called where people read it, rather than what opens it.

    >>> display_name("charts?num_rows=2400&seed=7")
    'Built-in charts, 2,400 rows'
    >>> display_name("lmms-lab/DocVQA", "InfographicVQA")
    'lmms-lab/DocVQA, InfographicVQA'
    >>> display_name("s3://bucket/receipts/2026/train.parquet")
    '…/2026/train.parquet'
    """
    if _is_charts(dataset_name):
        return parse_charts_name(dataset_name).title
    parts = [part for part in dataset_name.split("/") if part]
    is_whole = dataset_name in DATASETS or len(parts) <= 2
    name = dataset_name if is_whole else "…/" + "/".join(parts[-2:])
    return name if config is None else f"{name}, {config}"


def hub_dataset(dataset_name: str) -> str | None:
    """Return the id of a dataset on the hub; None for what is built in or lies elsewhere.

    >>> hub_dataset("hf://datasets/lmms-lab/DocVQA/data/*.parquet")
    'lmms-lab/DocVQA'
    >>> hub_dataset("charts?num_rows=2400")
    """
    if dataset_name.startswith("hf://datasets/"):
        return "/".join(dataset_name.split("/")[3:5])
    is_elsewhere = "://" in dataset_name or Path(dataset_name).expanduser().exists()
    return None if _is_charts(dataset_name) or is_elsewhere else dataset_name


def _is_charts(dataset_name: str) -> bool:
    return dataset_name.partition("?")[0] == "charts"
