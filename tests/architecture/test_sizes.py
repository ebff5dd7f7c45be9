"""What is short enough to be read at once: files, folders of the package, jobs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from helpers.paths import ROOT

MAX_LINES = 400
MAX_FILES = 12
MAX_JOB_LINES = 60

PYTHON = [
    path for top in ("vlmray", "jobs", "benchmarks", "tests") for path in sorted((ROOT / top).rglob("*.py"))
]


def _files(folder: Path) -> list[Path]:
    """Return what lies in a folder itself; not what editors and Python leave there."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return [path for path in paths if not path.name.startswith(".") and path.suffix not in (".pyc", ".so")]


def test_files_are_short() -> None:
    sizes = {path: path.read_text(encoding="utf-8").count("\n") for path in PYTHON}
    assert len(sizes) > 200, "files are looked for where they are no more"
    long = [
        f"{path.relative_to(ROOT)} has {lines} lines; {MAX_LINES} are the most: give a part its own file"
        for path, lines in sizes.items()
        if lines > MAX_LINES
    ]
    assert not long, "\n".join(long)


def test_folders_are_small() -> None:
    below = [path for path in sorted((ROOT / "vlmray").rglob("*/")) if "__pycache__" not in path.parts]
    sizes = {folder: len(_files(folder)) for folder in (ROOT / "vlmray", *below) if folder.is_dir()}
    full = [
        f"{folder.relative_to(ROOT)}/ has {files} files; {MAX_FILES} are the most: give some a folder below"
        for folder, files in sizes.items()
        if files > MAX_FILES
    ]
    assert not full, "\n".join(full)


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.name)
def test_jobs_are_thin(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.count("\n")
    assert lines <= MAX_JOB_LINES, (
        f"jobs/{path.name} has {lines} lines; {MAX_JOB_LINES} are the most: what it does belongs in vlmray/"
    )
    shows = f"python jobs/{path.name} " in (ast.get_docstring(ast.parse(text)) or "")
    assert shows, (
        f"the docstring of jobs/{path.name} has to show the exact command: python jobs/{path.name} ..."
    )
