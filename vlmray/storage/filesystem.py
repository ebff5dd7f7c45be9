"""Local folders and URIs (s3://, gs://, ...) by one interface, pyarrow's."""

from __future__ import annotations

from pathlib import Path

from pyarrow.fs import FileSystem, LocalFileSystem

from vlmray.errors import OptionError

# Uploads to an object store appear when they are complete; elsewhere a rename makes it so.
_ATOMIC = ("s3", "gcs", "abfs")


def absolute_uri(path: str) -> str:
    """Return a path, or a URI, that means the same whatever the working folder."""
    return path.rstrip("/") if "://" in path else str(Path(path).expanduser().resolve())


def open_filesystem(uri: str) -> tuple[FileSystem, str]:
    """Return the file system that an absolute path or a URI is in, and the path there."""
    if "://" not in uri:
        return LocalFileSystem(), uri
    filesystem, path = FileSystem.from_uri(uri)
    return filesystem, path.rstrip("/")


def writes_whole_files(filesystem: FileSystem) -> bool:
    """Tell whether a file that is being written does not show before it is complete."""
    return filesystem.type_name in _ATOMIC


_WRITTEN = (
    "options.json",
    "run.json",
    "report.html",
    "report.md",
    "results.json",
    "speed.json",
    "predictions.parquet",
)


def check_apart(output_dir: str, dataset_name: str, *models: str | None, option: str = "output_dir") -> None:
    """Refuse an output folder that would be read as data, or as a model, once something is in it.

    Args:
        output_dir: Folder or URI that a job writes to.
        dataset_name: What it reads: a folder, a file or a URI; of another name nothing lies here.
        models: Folders, or other names, of what it loads.
        option: What names the output folder.

    Raises:
        ValueError: The folder is in the dataset's, or that is in it, or it is a model's own.
    """
    output, data = _local_path(output_dir), _local_path(dataset_name)
    if output is None:
        return
    hint = "choose another folder"
    if data is not None and data.is_dir() and lie_in_one_another(output_dir, dataset_name):
        problem = f"{output_dir} and --dataset_name {dataset_name} lie in one another"
        raise OptionError(option, f"{problem}: results would be read as data", hint)
    if data is not None and data.parent == output and data.name in _WRITTEN:
        raise OptionError(
            option, f"{output_dir} is where --dataset_name {dataset_name} would be written", hint
        )
    for model in models:
        if model and _local_path(model) == output and output.is_dir():
            raise OptionError(
                option, f"{output_dir} is the folder of {model}, whose files would change", hint
            )


def lie_in_one_another(one: str, other: str) -> bool:
    """Tell whether two folders or URIs are the same, or one holds the other."""
    here, there = _local_path(one), _local_path(other)
    if here is None or there is None:
        first, second = (f"{absolute_uri(name)}/" for name in (one, other))
        return first.startswith(second) or second.startswith(first)
    return here.is_relative_to(there) or there.is_relative_to(here)


def _local_path(name: str) -> Path | None:
    """Return where a path or a `file://` URI leads, links followed."""
    if name.startswith("file://"):
        return Path(open_filesystem(name)[1]).resolve()
    return None if "://" in name else Path(name).expanduser().resolve()
