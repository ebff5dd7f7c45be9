"""Local folders and URIs (s3://, gs://, ...) by one interface, pyarrow's."""

from __future__ import annotations

from pathlib import Path

from pyarrow.fs import FileSystem, LocalFileSystem

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
