"""What is there beside what was there before: processes, ports, and files in memory and in a folder."""

from __future__ import annotations

import contextlib
import ctypes
import re
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
_SHARED_MEMORY = Path("/dev/shm")
PATIENCE_S = 30.0


class Traces:
    """What there is when it is made; `left` says later what has been added and is still there.

    From then on every orphan below this process becomes its child, so none escapes.

    Args:
        folder: A folder whose files are looked at, one for temporary files for example.
    """

    def __init__(self, folder: Path) -> None:
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
        self._folder = folder
        self._files = self._list_files()
        self._processes = descendants()

    def left(self, port: int, patience_s: float = PATIENCE_S) -> dict[str, list[str]]:
        """Name the processes, ports and files that are left.

        Args:
            port: A port that nobody should listen on any more.
            patience_s: Time that processes have to leave.
        """
        processes = wait_until_empty(lambda: titles(descendants() - self._processes), patience_s)
        files = self._list_files() - self._files
        return {
            "processes": processes,
            "ports": [] if is_free(port) else [str(port)],
            "files": sorted(map(str, filter(_is_ours, files))),
        }

    def _list_files(self) -> set[Path]:
        return {*self._folder.iterdir(), *_SHARED_MEMORY.iterdir()}


def descendants(title: str = "") -> set[psutil.Process]:
    """Return the living processes below this one whose command line has this in it."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # gone by now
            if process.status() != psutil.STATUS_ZOMBIE and title in " ".join(process.cmdline()):
                found.add(process)
    return found


def titles(processes: set[psutil.Process]) -> list[str]:
    """Return the command lines of those that are still there."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):  # gone by now
            found.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
    return sorted(found)


def wait_until_empty(look: Callable[[], Sequence[str]], patience_s: float = PATIENCE_S) -> list[str]:
    """Wait for what leaves by itself; return what stays."""
    deadline = time.monotonic() + patience_s
    while (there := [*look()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return there


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def is_free(port: int) -> bool:
    """Whether nobody listens on a port."""
    try:
        with socket.create_server(("127.0.0.1", port)):
            return True
    except OSError:
        return False


def _is_ours(path: Path) -> bool:
    """Whether nobody else has the file in memory, or gave it his number; others share that memory."""
    if path.parent != _SHARED_MEMORY:
        return True
    if any(psutil.pid_exists(int(number)) for number in re.findall(r"\d{2,9}", path.name)):
        return False
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):  # gone by now
            if str(path) in Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8"):
                return False
    return True
