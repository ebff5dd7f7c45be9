"""Other processes and servers for tests: `jobs/infer.py` and what it leaves behind, and HTTP."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from helpers.paths import ROOT


def command(*options: object) -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / "infer.py"), *map(str, options)]


def run(*options: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **env}
    return subprocess.run(command(*options), cwd=cwd, env=env, capture_output=True, text=True, timeout=280)


def start(*options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(command(*options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition: Callable[[], object], timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def descendants(title: str, of: int | None = None) -> list[psutil.Process]:
    """Ray's processes of this title that this process, or the one of this id, has started."""
    found = []
    for process in psutil.Process(of).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # gone by now
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found


def marked(name: str, value: str) -> list[psutil.Process]:
    """Living processes, beside this one, that were started with a variable in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_other = process.pid != os.getpid() and process.environ().get(name) == value
            if is_other and is_alive(process):
                found.append(process)
    return found


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended may wait for ever to be asked how."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def http_server(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server on a free port of this machine; its URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def huge_png(width: int, height: int) -> bytes:
    """A small file that says it has this many pixels."""
    return png(width, height, 8, 2, bytes(1_000_000))


def png(width: int, height: int, depth: int, kind: int, pixels: bytes, transparency: bytes = b"") -> bytes:
    """A file of any bit depth and kind of colour: rows of pixels, each with a zero before it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))]
    chunks += [(b"tRNS", transparency)] if transparency else []
    chunks += [(b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def finished(folder: Path) -> set[str]:
    """Ids of the samples whose files are complete."""
    return {path.name.removesuffix("_out.json") for path in folder.glob("*_out.json")}


def parquet_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Result rows by sample id; each has to be there once."""
    rows = pq.read_table(folder / "predictions").to_pylist()
    assert set(Counter(row["sample_id"] for row in rows).values()) == {1}
    return {row["sample_id"]: row for row in rows}
