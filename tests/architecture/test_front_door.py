"""What the package offers at its front door, and that every name the documentation speaks of is there."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vlmray
from helpers.paths import ROOT

DOCUMENTED = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "cluster.yaml",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
    *sorted((ROOT / "vlmray").rglob("*.py")),
]
NAMES = re.compile(r"(?<![\w./-])vlmray(?:\.[A-Za-z_]\w*)+")


def test_type_checkers_see_what_is_there() -> None:
    """The block for type checkers names the same things in the same modules as the table."""
    tree = ast.parse(Path(vlmray.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: str(node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {name: f"vlmray.{home}" for name, home in vlmray._HOMES.items()}


@pytest.mark.parametrize("name", vlmray.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(vlmray, name).__name__ == name


def test_a_name_is_no_folder() -> None:
    folders = {path.name for path in (ROOT / "vlmray").iterdir()} | {
        path.stem for path in (ROOT / "vlmray").glob("*.py")
    }
    assert not folders & set(vlmray.__all__)
    with pytest.raises(AttributeError, match="module 'vlmray' has no attribute 'infer'"):
        vlmray.infer  # noqa: B018


def test_importing_it_costs_nothing() -> None:
    script = "import sys, vlmray; dir(vlmray); print(*(name for name in sys.modules if 'vlmray.' in name))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["vlmray._lazy"]


def find_names(path: Path) -> set[str]:
    return set(NAMES.findall(path.read_text(encoding="utf-8")))


def test_what_the_documentation_names_is_there() -> None:
    names = {name: path for path in DOCUMENTED for name in find_names(path)}
    assert len(names) > 100
    gone = [f"{path.relative_to(ROOT)}: {name}" for name, path in sorted(names.items()) if not is_there(name)]
    assert not gone, "\n".join(gone)


def is_there(name: str) -> bool:
    """Tell whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False
