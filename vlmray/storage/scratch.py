"""Folders of this machine that last as long as the process that made them, even if it is killed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give a folder for the time being, and delete those that processes left here that were killed."""
    prefix = f"vlmray-{socket.gethostname()}-"  # the folder for temporary files may be shared by machines
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        name = re.fullmatch(rf"{re.escape(prefix)}(\d+)-\w+", folder.name)
        if name and not _runs(int(name[1])):
            shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}-") as folder_name:
        yield Path(folder_name)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of somebody else
        return True
    return True
