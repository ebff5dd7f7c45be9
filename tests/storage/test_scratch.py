"""Scratch folders go with the process that made them, also where it is killed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vlmray.storage.scratch import scratch_folder

LEAVE = """
import os, signal
from vlmray.storage.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "checkpoint").touch()
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_killed_processes_left_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    left = Path(subprocess.run([sys.executable, "-c", LEAVE], capture_output=True, text=True).stdout.strip())
    assert (left / "checkpoint").exists()
    others = [tmp_path / name for name in ("vlmray-elsewhere-1-abc", f"{left.name}.txt", "vlmray-vision-1")]
    for other in others:
        other.mkdir()
    with scratch_folder() as folder, scratch_folder() as second:
        assert not left.exists()
        assert folder.is_dir()
        assert second.is_dir()
        assert folder != second
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_processes_that_clean_up_at_once_are_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def take_turns(_: int) -> None:
        for _ in range(200):
            with scratch_folder() as folder:
                (folder / "file").touch()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(take_turns, range(8)))
    assert not list(tmp_path.iterdir())
