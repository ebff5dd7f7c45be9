"""Short digests that tell whether what lies behind a name has changed. Standard library only."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

_MOST_BYTES, _MOST_FILES = 256 << 20, 10_000
"""What is read in full; about a second."""


def digest(*parts: object) -> str:
    """Return 16 hex digits of plain values: strings, bytes, numbers, and tuples of them."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def digest_content(path: Path) -> bytes:
    """Return a digest of all that is in a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def fingerprint_path(path: Path) -> str:
    """Return 16 hex digits that change when a file does, or any file of a folder.

    Up to 256 MiB and 10,000 files it is names and contents, so that a copy is the same wherever and whenever
    it was made. Beyond, nothing is read: it is names, sizes and times of change. Hidden files do not count.
    """
    if path.is_file():
        return fingerprint_files([path], path)
    return fingerprint_files(_walk(path), path)


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]  # not to be entered
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def fingerprint_files(files: Iterable[Path], base: Path) -> str:
    """Return 16 hex digits that change when one of the files does; they are named as seen from `base`."""
    stats = {file.relative_to(base).as_posix(): file.stat() for file in files if file.is_file()}
    names = sorted(stats)
    if len(names) <= _MOST_FILES and sum(stat.st_size for stat in stats.values()) <= _MOST_BYTES:
        return digest(*((name, digest_content(base / name)) for name in names))
    return digest(*((name, stats[name].st_size, stats[name].st_mtime_ns) for name in names))
