"""Where rows come from: a split of a dataset, addressed by row index.

Three kinds of source share one small interface: what the `datasets` library loads (hub, local folder
or file), Parquet behind a URI that any node reads, and the built-in charts. A source pickles to a few
hundred bytes, so it travels to the tasks that read, and none of them holds rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from vlmray.builtin.charts import ChartsSource, parse_charts_name
from vlmray.dataset.huggingface import HFSource, load_hf_dataset
from vlmray.dataset.parquet import ParquetSource
from vlmray.dataset.registry import DATASETS

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

    def fingerprint(self) -> str:
        """Return what changes when the rows do, found without reading them; not where they lie.

        Images that rows name by path or URL, outside of the dataset's own folder, do not count.
        """
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
    if "[" in split or "/" in split:
        raise ValueError(f"--dataset_split {split!r} is not a split name; rows are chosen by --sample_slices")
    is_charts = _is_charts(dataset_name)
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
    return HFSource(load_hf_dataset(dataset_name, split, config), base_dir, path if base_dir else None)


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


def _is_charts(dataset_name: str) -> bool:
    return dataset_name.partition("?")[0] == "charts"
