"""Text files of a split that the `datasets` library found: CSV, TSV, JSON, metadata of an image folder."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmray.dataset.text.files import scan
from vlmray.dataset.text.source import TextSource
from vlmray.storage.fingerprints import fingerprint_files

if TYPE_CHECKING:
    import datasets

COMMIT = re.compile(r"(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])")
SEPARATORS = {".csv": ",", ".tsv": "\t", ".jsonl": None, ".json": None}
"""Of cells, by suffix; None: the rows are JSON."""
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_SAID_BY_US = ("name", "version", "data_dir", "data_files", "description", "sep", "delimiter", "features")
_PICTURE = re.compile(r"(?:(.+)_)?file_name(s?)")


def open_text(
    builder: datasets.DatasetBuilder, split: str, *, base_dir: Path | None, path: Path | None
) -> TextSource | None:
    """Open the text files of a split, or return None where `datasets` has to read it.

    That is any other format, and text whose repository says how to read it: types other than texts and
    numbers, encodings, rows to skip.

    Args:
        builder: What `datasets` would read it with.
        split: One that the builder has.
        base_dir: Folder that relative image paths start from.
        path: Local file or folder that the dataset was named by; None where that was the hub.

    Raises:
        ValueError: a file is not what its name says.
    """
    import datasets
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
    from datasets.packaged_modules.json.json import Json

    if not isinstance(builder, Csv | Json | ImageFolder) or _has_wishes(builder):
        return None
    names = [str(name) for name in builder.config.data_files[split]]
    manager = datasets.DownloadManager()
    if isinstance(builder, ImageFolder):
        return _open_metadata(names, manager, path=path)
    found = manager.download_and_extract(names)
    files = [Path(file) for each in found for file in manager.iter_files(each)]
    separator = builder.config.sep if isinstance(builder, Csv) else None
    return TextSource(
        [scan(file, separator) for file in files],
        base_dir=base_dir, path=path, fingerprint=None if path else _fingerprint(names, files),
    )  # fmt: skip


def _has_wishes(builder: datasets.DatasetBuilder) -> bool:
    """Tell whether the repository says more of its files than where they are."""
    import datasets

    config: Any = builder.config
    usual = {field.name: getattr(type(config)(), field.name) for field in dataclasses.fields(config)}
    features = builder.info.features or config.features or {}
    texts = all(isinstance(getattr(kind, "feature", kind), datasets.Value) for kind in features.values())
    return not texts or any(
        getattr(config, name) != value for name, value in usual.items() if name not in _SAID_BY_US
    )


def _open_metadata(names: Sequence[str], manager: Any, *, path: Path | None) -> TextSource | None:
    """Open the metadata of an image folder, whose rows name the images beside it."""
    tables = [name for name in names if Path(name).name in _METADATA]
    separators = {SEPARATORS.get(Path(name).suffix, "") for name in tables}
    if len(separators) != 1 or "" in separators or any(name.endswith(".zip") for name in names):
        return None
    local = dict(zip(names, map(Path, manager.download(list(names))), strict=True))
    files = [scan(local[name], *separators) for name in sorted(tables)]
    matches = {name: _PICTURE.fullmatch(name) for file in files for name in file.columns}
    pictures = {name: match[1] or f"image{match[2]}" for name, match in matches.items() if match}
    if not pictures:
        return None  # which `datasets` has words for
    fingerprint = None if path else _fingerprint(names, list(local.values()))
    return TextSource(files, base_dir=None, path=path, fingerprint=fingerprint, pictures=pictures)


def _fingerprint(names: Sequence[str], files: Sequence[Path]) -> str:
    """Return the hub's commit, which is a part of its names, or 16 hex digits of the files."""
    commits = COMMIT.findall(names[0])
    return commits[-1] if commits else fingerprint_files(files, Path("/"))
