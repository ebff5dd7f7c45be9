"""No process of vLLM's outlives the one that started it, however that ended.

vLLM's processes end with whoever started them if that can tell them to, and stay if it was killed. So a
process beside them waits for a pipe to close, and then ends all that carry a mark in their environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid

_MARK = "VLMRAY_STARTED_BY"

_WAIT_AND_END = """
import os, signal, sys
sys.stdin.read()
mark = sys.argv[1].encode()
for name in filter(str.isdigit, os.listdir("/proc")):
    try:
        with open(f"/proc/{name}/environ", "rb") as file:
            if mark in file.read().split(b"\\0"):
                os.kill(int(name), signal.SIGKILL)
    except OSError:
        pass
"""


class ProcessGuard:
    """Marks what this process starts from now on, and ends it with this process; on Linux."""

    def __init__(self) -> None:
        name = uuid.uuid4().hex
        environment = {key: value for key, value in os.environ.items() if key != _MARK}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WAIT_AND_END, f"{_MARK}={name}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # what ends a job's group leaves it
        )
        os.environ[_MARK] = name
        os.environ["SPT_NOENV"] = "1"  # or the titles of vLLM's processes are written over their environment

    def close(self) -> None:
        """End what is left of it now."""
        os.environ.pop(_MARK, None)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
