"""The shape of the package: who may import whom, where Ray and torch are, jobs stay thin."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.paths import ROOT

GROUND = ("schema", "errors", "_lazy")
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "config": (),
    "storage": (),
    "images": (),
    "reports": (),
    "builtin": ("storage",),
    "metrics": (),
    "models": ("config", "storage", "builtin"),
    "dataset": ("config", "storage", "images", "builtin", "metrics", "models"),
    "engines": ("config", "images", "builtin", "models"),
    "inference": (
        "config", "storage", "images", "reports", "builtin", "metrics", "models", "dataset", "engines",
        "cluster",
    ),
    "training": (
        "config", "images", "builtin", "metrics", "models", "dataset", "engines",
    ),
    "serving": ("config", "storage", "images", "builtin", "models", "engines", "cluster"),
    "finetune": (
        "config", "storage", "images", "reports", "builtin", "metrics", "models", "dataset", "engines",
        "training",
        "cluster",
    ),
    "benchmark": (
        "config", "storage", "images", "reports", "builtin", "metrics", "models", "dataset", "engines",
        "inference",
        "serving", "cluster",
    ),
    "demo": ("config", "storage", "reports", "builtin", "finetune", "benchmark"),
    "cluster": (),
    "stages": ("inference",),
    "cli": ("config", "inference", "finetune", "serving", "benchmark", "demo", "cluster"),
}  # fmt: skip
"""Folders, and modules beside them, with what each may import beside itself and the ground. A new folder gets
a line here; wings that stand side by side (inference, training, serving) do not know each other."""

WITH_RAY = {
    "cluster", "inference.job", "inference.pipeline", "finetune.plan", "finetune.job", "finetune.progress",
    "finetune.ray_worker",
    "serving.server", "serving.replica", "benchmark.job", "benchmark.asking", "demo.job",
}  # fmt: skip
"""Modules that may import Ray; all others run, and are tested, without."""

WITH_TORCH = {
    "models.loading", "models.inputs", "models.vision", "models.processors", "models.families",
    "models.families.base", "models.families.patch_embedding", "models.families.qwen2_5_vl",
    "training.worker", "training.trainer", "training.evaluation", "training.checkpoint",
    "training.collator", "training.vision_cache", "training.arguments", "training.optimizers",
    "engines.transformers.engine", "engines.transformers.attention", "engines.transformers.cache",
    "engines.transformers.linear", "engines.transformers.memory", "engines.transformers.sampling",
    "engines.transformers.in_flight", "engines.transformers.batching", "engines.transformers.forward",
    "finetune.artifacts", "finetune.checks",
    "metrics.vqa_metrics.vqa_metrics",
}  # fmt: skip
"""Modules that may import torch, transformers or datasets, beside those with Ray."""

MAX_JOB_LINES = 60


def _modules() -> dict[str, Path]:
    names = {}
    for path in sorted((ROOT / "vlmray").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = _modules()


def _imports(name: str) -> set[str]:
    """Return the modules of the package that a module imports, inside functions too."""
    found = {target for node in ast.walk(ast.parse(MODULES[name].read_text())) for target in _targets(node)}
    return {target for target in found if target in MODULES} - {name}


def _targets(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=aliases):
            yield from (alias.name for alias in aliases)
        case ast.ImportFrom(module=str(module), level=0, names=aliases):
            submodules = [f"{module}.{alias.name}" for alias in aliases]
            yield from (target if target in MODULES else module for target in submodules)
        case ast.ImportFrom(level=level) if level > 0:
            pytest.fail("relative imports hide the direction; write the module's full name")


def _room(module: str) -> str:
    """Return the folder that a module is in, or its own name where it stands beside them."""
    return module.split(".")[1] if "." in module else module


def test_every_folder_is_in_the_table() -> None:
    rooms = {_room(name) for name in MODULES} - {"vlmray", *GROUND}
    assert rooms == MAY_IMPORT.keys()


def test_the_table_has_no_circle() -> None:
    graphlib.TopologicalSorter(MAY_IMPORT).prepare()  # raises CycleError, which names the circle


def test_imports_are_found() -> None:
    assert "vlmray.builtin.charts" in _imports("vlmray.dataset.sources")
    assert "vlmray.storage.hub" in _imports("vlmray.dataset.huggingface")  # from vlmray.storage import hub
    assert "vlmray.inference.job" in _imports("vlmray.cli")  # inside a function
    assert "vlmray" not in _imports("vlmray.dataset.sources")


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_folder_imports_what_it_may(room: str) -> None:
    allowed = {"vlmray", room, *GROUND, *MAY_IMPORT[room]}
    found = {
        (name, target)
        for name in MODULES
        if _room(name) == room
        for target in _imports(name)
        if _room(target) not in allowed
    }
    assert not found, "\n".join(f"{name} imports {target}" for name, target in sorted(found))


def test_no_import_cycles() -> None:
    # The front door names everything, for type checkers alone.
    graph = {name: _imports(name) - {"vlmray"} for name in MODULES if name != "vlmray"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.name)
def test_jobs_are_thin(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_JOB_LINES
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert f"python jobs/{path.name} " in docstring, "the docstring shows the exact command"


def _loaded_by(statements: str, *names: str) -> list[str]:
    """Return which of `names` a clean interpreter has loaded after some statements."""
    script = f"import sys\n{statements}\nprint(*sorted(set({names!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def _full(names: set[str]) -> set[str]:
    return {f"vlmray.{name}" for name in names}


def test_ray_is_imported_nowhere_else() -> None:
    without = [name for name in MODULES if name not in _full(WITH_RAY)]
    assert _loaded_by("\n".join(f"import {name}" for name in without), "ray") == []


def test_torch_is_imported_nowhere_else() -> None:
    light = [name for name in MODULES if name not in _full(WITH_RAY | WITH_TORCH)]
    loaded = _loaded_by("\n".join(f"import {name}" for name in light), "torch", "transformers", "datasets")
    assert loaded == []


def test_the_exceptions_are_no_more_than_needed() -> None:
    assert _full(WITH_RAY | WITH_TORCH) <= MODULES.keys()


@pytest.mark.parametrize(
    "name",
    [
        "vlmray",
        "vlmray.config",
        "vlmray.config.parsing",
        "vlmray.cli",
        "vlmray.schema",
        "vlmray.models.checks",
    ],
)
def test_what_help_needs_is_the_standard_library(name: str) -> None:
    heavy = ("torch", "ray", "transformers", "datasets", "pyarrow", "numpy", "PIL", "yaml", "huggingface_hub")
    assert _loaded_by(f"import {name}", *heavy) == []
