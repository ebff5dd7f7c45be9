"""What the package uses of other libraries that they do not offer: why, and when it can go.

The table in `helpers.private_apis` is the one place that says so. A test fails with the row's own words once
the library has changed it, where the package would only be slower or say less. Another finds uses that have
no row: by their leading underscore, so names that are merely undocumented need a reader who knows.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.private_apis import TABLE, Private

ROOT = Path(__file__).parents[2]


OFFERED = {"_asdict", "_exit", "_info", "_compute"}
"""Underscores that are documented: of named tuples, `os`, and metrics of `evaluate`."""


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.module}-{row.name}")
def test_it_is_what_it_was(row: Private) -> None:
    try:
        holds = row.holds()
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        pytest.fail(f"{row}\n  {type(error).__name__}: {error}")
    assert holds, str(row)


def _is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__") and name != "_"


def _uses(tree: ast.AST) -> Iterator[str]:
    """Names of others that a module imports, reads or sets by name."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=aliases) if not module.startswith("vlmray"):
                hidden = any(map(_is_private, module.split(".")))
                yield from (alias.name for alias in aliases if hidden or _is_private(alias.name))
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases if any(map(_is_private, alias.name.split("."))))
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                continue  # in question only in a class that inherits: see below
            case ast.Attribute(attr=name) if _is_private(name):
                yield name
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr" | "delattr"),
                args=[_, ast.Constant(value=name), *_],
            ) if _is_private(name):
                yield name


def _inherited(module: Any) -> Iterator[str]:
    """Names of foreign bases that a module's classes override, or use of themselves."""
    for cls in vars(module).values():
        if inspect.isclass(cls) and cls.__module__ == module.__name__:
            bases = [
                base for base in cls.__mro__ if base.__module__.split(".")[0] not in ("vlmray", "typing")
            ]
            theirs = {name for base in bases for name in vars(base) if _is_private(name)} - {"_abc_impl"}
            body = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls))))
            used = {node.attr for node in body if isinstance(node, ast.Attribute)}
            yield from theirs & (used | vars(cls).keys())


def _found() -> set[tuple[str, str]]:
    found = set()
    for path in sorted((ROOT / "vlmray").rglob("*.py")):
        parts = path.relative_to(ROOT / "vlmray").with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        module = importlib.import_module(f"vlmray.{name}" if name else "vlmray")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        used = {*_uses(tree)} - own | {*_inherited(module)}
        found |= {(name, use) for use in used - OFFERED}
    return found


def test_every_use_is_in_the_table() -> None:
    named = {(row.module, row.name) for row in TABLE}
    found = _found()
    assert not found - named, "\n".join(
        f"vlmray/{module.replace('.', '/')}.py uses {use}: give it a row in TABLE, or do without"
        for module, use in sorted(found - named)
    )
    stale = {row for row in named - found if row[1] not in _source_of(row[0])}
    assert not stale, f"nothing uses them, so their rows in TABLE can go: {sorted(stale)}"
    assert len(named) == len(TABLE)


def _source_of(module: str) -> str:
    return (ROOT / "vlmray" / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("from ray._private.utils import read_ray_address", ["read_ray_address"]),
        ("from trl.trainer.utils import _use_triton", ["_use_triton"]),
        ("import ray._private.state", ["ray._private.state"]),
        ("trl.trainer.utils._use_triton = None", ["_use_triton"]),
        ("super()._save_checkpoint()", ["_save_checkpoint"]),
        ("self.model._modules", ["_modules"]),
        ("getattr(module, '_hf_hook', None)", ["_hf_hook"]),
        ("from vlmray._lazy import offer; self._mine = [thing.__class__ for _ in things]", []),
    ],
)
def test_uses_are_seen(code: str, names: list[str]) -> None:
    assert list(_uses(ast.parse(code))) == names
