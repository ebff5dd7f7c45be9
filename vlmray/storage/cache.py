"""What vlmray keeps on a machine because it can make it again."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """Return where vlmray keeps what it can make again: `$VLMRAY_CACHE`, or `~/.cache/vlmray`."""
    return Path(os.environ.get("VLMRAY_CACHE") or Path.home() / ".cache" / "vlmray")


def make_once(folder: Path, make: Callable[[Path], object]) -> None:
    """Have a folder made if it is not there; it appears by one rename, so processes may ask for it together.

    Args:
        folder: What is wanted.
        make: Fills the folder that it is given.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        make(scratch)
        scratch.chmod(0o755)  # mkdtemp makes folders that only their owner reads
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster, with the same bytes
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
