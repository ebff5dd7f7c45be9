"""Folders of this machine that last as long as the process that made them, even if it is killed."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

_LOCK = ".lock"


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give a folder for the time being, and delete those that processes left here that were killed."""
    prefix = f"vlmray-{socket.gethostname()}-"  # the folder for temporary files may be shared by machines
    for lock in Path(tempfile.gettempdir()).glob(f"{prefix}*{_LOCK}"):
        _delete_if_left(lock)
    # The system lets go of a lock when its process ends, however that comes.
    # Deleted before it is let go: who finds it free takes it for one that was left.
    with tempfile.NamedTemporaryFile(prefix=prefix, suffix=_LOCK, delete=False) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        folder = Path(held.name.removesuffix(_LOCK))
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            Path(held.name).unlink(missing_ok=True)  # found free between its making and its lock


def _delete_if_left(lock: Path) -> None:
    with contextlib.suppress(OSError), lock.open("rb") as file:  # of others, or gone by now
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
        lock.unlink()
