"""Splits that the `datasets` library loads: hub names, local folders and files."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmray.dataset.text.files import scan
from vlmray.dataset.text.opening import COMMIT, SEPARATORS, open_text
from vlmray.dataset.text.source import TextSource
from vlmray.dataset.text.values import count_filled, to_rows
from vlmray.errors import OptionError, one_line
from vlmray.storage import hub
from vlmray.storage.fingerprints import fingerprint_files, fingerprint_path

if TYPE_CHECKING:
    import datasets

_FILE_BUILDERS = {
    ".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow",
}  # fmt: skip
_BATCH_SIZE = 1000
_SPLIT = re.compile(r"\w+(\.\w+)*")  # as `datasets` wants it of a split that it names


def load_hf_dataset(dataset_name: str, split: str, config: str | None = None) -> datasets.Dataset:
    """Load a split with the `datasets` library: a hub name, a local folder or a local file.

    A hub name also works without the network, from the local caches. Types are the library's, which guesses
    those of CSV and JSON; `open_source` reads them as they are written.

    Raises:
        ValueError: nothing is there, the hub cannot be reached, the split or configuration is unknown,
            or the files cannot be read; the message names the option and what is there.
    """
    with _mistakes_of(dataset_name):
        return _load(_find(dataset_name, split, config), split, dataset_name)


def open_split(
    dataset_name: str, split: str, config: str | None, *, base_dir: Path | None, path: Path | None
) -> HFSource | TextSource:
    """Open a split that `load_hf_dataset` loads; text files are read as they are written.

    Args:
        dataset_name: Hub name, local folder or local file.
        split: Split to open.
        config: Configuration of the dataset, where it has several.
        base_dir: Folder that relative image paths start from.
        path: The local file or folder; None for a hub name.

    Raises:
        ValueError: as of `load_hf_dataset`.
    """
    import datasets

    with _mistakes_of(dataset_name):
        if path is not None and path.is_file() and path.suffix.lower() in SEPARATORS:
            _check_name(split)
            files = [scan(path.absolute(), SEPARATORS[path.suffix.lower()])]
            return TextSource(files, base_dir=base_dir, path=path)
        found = _find(dataset_name, split, config)
        if not isinstance(found, datasets.Dataset):
            splits = found.config.data_files or {}
            if splits and split not in splits:
                raise _unknown_split(split, dataset_name, map(str, splits))
            text = open_text(found, split, base_dir=base_dir, path=path)
            if text is not None:
                return text
        return HFSource(_load(found, split, dataset_name), base_dir, path)


@contextlib.contextmanager
def _mistakes_of(dataset_name: str) -> Iterator[None]:
    """Make one line of what goes wrong with a dataset."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    # What goes wrong is raised as well, and a mistake should be one line.
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except OptionError:
        raise
    except (ValueError, KeyError) as error:
        raise OptionError("dataset_name", f"{dataset_name} cannot be read: {one_line(error)}") from error
    except (OSError, DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise OptionError("dataset_name", f"{dataset_name} cannot be read: {one_line(cause)}") from error


def _find(dataset_name: str, split: str, config: str | None) -> datasets.DatasetBuilder | datasets.Dataset:
    """Find a dataset: what was saved to disk, or what builds a dataset of its files."""
    import datasets

    path = Path(dataset_name).expanduser()
    if path.exists():
        datasets.disable_progress_bars()
        return _find_local(path, split, config)
    if path.is_absolute() or dataset_name.startswith((".", "~")) or path.suffix in _FILE_BUILDERS:
        raise OptionError("dataset_name", f"{dataset_name}: no such file or folder")
    return _find_on_hub(dataset_name, config)


def _find_local(path: Path, split: str, config: str | None) -> datasets.DatasetBuilder | datasets.Dataset:
    import datasets

    if (path / "dataset_dict.json").is_file():  # written by DatasetDict.save_to_disk
        splits = datasets.load_from_disk(str(path))
        if split not in splits:
            raise _unknown_split(split, str(path), splits)
        return splits[split]
    if (path / "state.json").is_file():  # written by Dataset.save_to_disk
        return datasets.load_from_disk(str(path))
    if path.is_dir():
        return _open_builder(str(path), config)
    builder = _FILE_BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise ValueError(f"unknown file type {path.suffix!r}; known: {', '.join(_FILE_BUILDERS)}")
    _check_name(split)
    options = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    return datasets.load_dataset_builder(builder, data_files={split: str(path)}, **options)


def _check_name(split: str) -> None:
    """Check what a file's split is called, which may be any name."""
    if not _SPLIT.fullmatch(split):
        raise OptionError("dataset_split", f"{split!r} is not a split name", "use letters, digits, _ and .")


def _find_on_hub(name: str, config: str | None) -> datasets.DatasetBuilder:
    try:
        hub.check_reachable(name, "dataset")
    except hub.HubUnavailableError as unavailable:
        # The hub's own cache holds the repository's files; the cache of `datasets` what it made of them.
        snapshot = hub.cached_snapshot(name, "dataset")
        if snapshot is not None:
            return _open_builder(str(snapshot), config)
        try:
            with _offline():
                return _open_builder(name, config)
        except (ConnectionError, FileNotFoundError):
            raise unavailable from None
    return _open_builder(name, config)


def _load(found: datasets.DatasetBuilder | datasets.Dataset, split: str, name: str) -> datasets.Dataset:
    """Do what `datasets.load_dataset` does, in steps: which one fails says which option is wrong."""
    import datasets

    if isinstance(found, datasets.Dataset):
        return found
    _prepare(found)
    lengths = {known: info.num_examples for known, info in (found.info.splits or {}).items()}
    try:
        datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except ValueError as error:
        raise _unknown_split(split, name, lengths) from error
    if lengths.get(split) == 0:
        raise without_rows(name, split)
    return found.as_dataset(split=split)


def _prepare(builder: datasets.DatasetBuilder) -> None:
    from datasets.exceptions import DatasetGenerationError

    try:
        builder.download_and_prepare()
    except DatasetGenerationError:
        if getattr(builder.config, "batch_size", 0) is not None:
            raise
        # Of Parquet it reads as many rows at a time as the first row group has, which may be none.
        builder.config.batch_size = _BATCH_SIZE
        builder.download_and_prepare()


def _open_builder(path: str, config: str | None) -> datasets.DatasetBuilder:
    import datasets

    try:
        return datasets.load_dataset_builder(path, name=config)
    except ValueError as error:
        if _knows_config(path, config):
            raise
        raise OptionError("dataset_config", f"{config!r}: {one_line(error)}") from error


def _knows_config(path: str, config: str | None) -> bool:
    """Tell whether a dataset has a configuration; None stands for its default."""
    import datasets

    if datasets.config.HF_HUB_OFFLINE and not Path(path).exists():
        return False  # of what was cached of it there is nothing else to choose by
    if config is None:
        return datasets.get_dataset_default_config_name(path) is not None
    return config in datasets.get_dataset_config_names(path)


def _unknown_split(split: str, name: str, known: Iterable[str]) -> OptionError:
    return OptionError("dataset_split", f"{split!r}: {name} has {', '.join(known)}")


def without_rows(name: str, split: str) -> OptionError:
    """Return what is raised for a split that holds nothing."""
    return OptionError("dataset_name", f"{name} has no rows in split {split!r}")


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


class HFSource:
    """A split that `datasets` loaded: memory-mapped on the driver's machine, pickled as its path."""

    on_driver = True
    same_image_column = None

    def __init__(
        self, dataset: datasets.Dataset, base_dir: Path | None = None, path: Path | None = None,
        *, fingerprint: str | None = None,
    ) -> None:  # fmt: skip
        """Take over a dataset.

        Args:
            dataset: What was loaded.
            base_dir: Folder that relative image paths start from.
            path: Local file or folder that it was loaded from; None where that was the hub.
            fingerprint: What it is known by already.
        """
        # As Arrow nothing is decoded: no image (also in lists), and no audio in a column nobody asked for.
        self._dataset = dataset.with_format("arrow")
        inner = {name: getattr(feature, "feature", feature) for name, feature in dataset.features.items()}
        self._class_names = {
            name: feature.names for name, feature in inner.items() if hasattr(feature, "int2str")
        }
        self.column_names = list(dataset.column_names)
        self.base_dir = str(base_dir) if base_dir else None
        self._path = path
        self._fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._dataset)

    def fingerprint(self) -> str:
        """Return the hub's commit, or 16 hex digits of the files.

        Up to 256 MiB that is their contents, so that a copy is the same; beyond, their sizes and times. Of a
        folder all files count, of every split, and images among them; of one that `datasets` saved to disk
        only the split's own.
        """
        if self._fingerprint is None:
            self._fingerprint = self._find_fingerprint()
        return self._fingerprint

    def _find_fingerprint(self) -> str:
        files = [Path(file["filename"]) for file in self._dataset.cache_files]
        if self._path is None:
            # Wherever it came from, the commit is a folder of its path in the cache of `datasets`, which
            # has a fingerprint of its own for all else; that one counts the time of download too.
            parts = [part for file in files for part in file.parts if COMMIT.fullmatch(part)]
            return parts[-1] if parts else self._dataset._fingerprint
        path = self._path.resolve()
        if files and all(file.resolve().is_relative_to(path) for file in files):  # mapped as it lies there
            return fingerprint_files([file.resolve() for file in files], path)
        return fingerprint_path(self._path)

    def read(self, indices: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Read rows, with their images as encoded bytes."""
        dataset = self._dataset if columns is None else self._dataset.select_columns(list(columns))
        return [name_classes(row, self._class_names) for row in to_rows(dataset[list(indices)])]

    def count_filled(self, column: str) -> int:
        """Count the rows that have a value in a column."""
        return count_filled(self._dataset.select_columns([column]).with_format("arrow")[:].column(0))


def name_classes(row: dict[str, Any], class_names: dict[str, list[str]]) -> dict[str, Any]:
    """Replace class indices by their names, in lists too; -1 and None mean no label."""
    for column in class_names.keys() & row.keys():
        row[column] = _name_class(row[column], class_names[column])
    return row


def _name_class(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_name_class(item, names) for item in value]
    return names[value] if value is not None and 0 <= value < len(names) else None
