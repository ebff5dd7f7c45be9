"""What a job is started in: standard streams that may be closed, full or ASCII, and a locale that may be C.

None of that is a reason to lose hours of work, so what cannot be written there is lost instead. Standard
library only.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import Any


def use_utf8() -> None:
    """Start this process anew with UTF-8 names of files, where Python was told that there is only ASCII.

    Under `LC_ALL=C` Python does so by itself, unless variables keep it from that.
    """
    if codecs.lookup(sys.getfilesystemencoding()).name == "ascii":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})


def steady_streams() -> None:
    """Have stdout and stderr drop what cannot be written; streams that somebody else put there are left."""
    for number in range(3):
        _open_if_closed(number)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _steady(1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _steady(2, sys.stderr)


def _open_if_closed(number: int) -> None:
    """Take a closed descriptor, or the next file that is opened would be what everybody prints to."""
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # gets the smallest free number, which is this one


def _steady(number: int, stream: Any) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(_Lossy(number, "wb", closefd=False)),
        encoding=getattr(stream, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=number == 2 or os.isatty(number),
    )


class _Lossy(io.FileIO):
    """A file that takes whatever is written to it, be it closed, full or left by its reader."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written
