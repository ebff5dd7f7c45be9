"""Weight files by their headers: whether they are whole, and the shapes in them. Standard library only.

A safetensors file is eight bytes of length, that many of JSON (dtype, shape and place of each tensor), and
the tensors, which are not read here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

_LFS = b"version https://git-lfs"


def check_whole(folder: Path) -> None:
    """Check that all weights of a checkpoint are there to their last byte.

    Raises:
        ValueError: One of the files is missing, cut short, or not what its name says.
    """
    index = folder / INDEX
    names = {WEIGHTS}
    if index.is_file():
        names = _read_index(index)
    elif not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has neither {WEIGHTS} nor {INDEX}; copy what is missing")
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        count = f"{len(missing)} of {len(names)} weight files"
        raise ValueError(f"{folder} lacks {count}, {missing[0]} among them; copy what is missing")
    for name in sorted(names):
        read_header(folder / name)


def check_not_a_pointer(path: Path) -> None:
    """Refuse a file of which `git clone` without Git LFS has left a pointer.

    Raises:
        ValueError: It is one.
    """
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise ValueError(
                f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
            )


def read_tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a safetensors file, by name.

    Raises:
        ValueError: Not a safetensors file, or cut short.
    """
    return {name: tuple(entry["shape"]) for name, entry in read_header(path)[0].items()}


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Return what a safetensors file says of its tensors (dtype, shape, offsets), and where data begins.

    Raises:
        ValueError: Not a safetensors file, or cut short.
    """
    check_not_a_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            found = "is not a complete safetensors file" if size else "is empty"
            raise ValueError(f"{path} {found}; write or copy it again")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, AttributeError, TypeError, LookupError) as error:
            raise ValueError(f"{path} is not a safetensors file; write or copy it again") from error
    if size < end:
        problem = f"not a complete safetensors file: it has {size:,} of {end:,} bytes"
        raise ValueError(f"{path} is {problem}; write or copy it again")
    return header, 8 + length


def _read_index(path: Path) -> set[str]:
    """Return the names of the files that hold a checkpoint's weights."""
    check_not_a_pointer(path)
    try:
        return set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, AttributeError, TypeError, LookupError) as error:
        raise ValueError(f"{path} is not an index of weights; write or copy it again") from error
