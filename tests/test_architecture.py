"""The shape of the package: imports go down, nothing but the jobs needs Ray, jobs stay thin."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LEVELS: dict[str, int] = {
    "vlmray": 0,
    "vlmray.schema": 0,
    "vlmray.config": 0,
    "vlmray.options": 0,
    "vlmray.hub": 0,
    "vlmray.checkpoints": 0,
    "vlmray.chart_drawing": 1,
    "vlmray.charts": 1,
    "vlmray.dataset": 1,
    "vlmray.sources": 1,
    "vlmray.fetch": 1,
    "vlmray.images": 1,
    "vlmray.prompts": 1,
    "vlmray.metrics": 1,
    "vlmray.outputs": 1,
    "vlmray.page": 1,
    "vlmray.report": 1,
    "vlmray.batches": 1,
    "vlmray.axes": 1,
    "vlmray.plots": 1,
    "vlmray.lanes": 1,
    "vlmray.timeline": 1,
    "vlmray.training_report": 1,
    "vlmray.comparison": 1,
    "vlmray.significance": 1,
    "vlmray.scoreboard": 1,
    "vlmray.benchmark_report": 1,
    "vlmray.vqa_metrics": 1,
    "vlmray.vqa_metrics.vqa_metrics": 1,
    "vlmray.endpoint": 3,
    "vlmray.benchmark": 7,
    "vlmray.small_models": 2,
    "vlmray.optimizers": 2,
    "vlmray.model": 2,
    "vlmray.lora": 2,
    "vlmray.encoding": 2,
    "vlmray.vision": 2,
    "vlmray.vision_cache": 2,
    "vlmray.collator": 3,
    "vlmray.engines.base": 2,
    "vlmray.engines.answers": 2,
    "vlmray.engines.cache": 2,
    "vlmray.engines.linear": 2,
    "vlmray.engines.attention": 2,
    "vlmray.engines.memory": 2,
    "vlmray.engines.sampling": 2,
    "vlmray.engines.transformers": 3,
    "vlmray.testing": 3,
    "vlmray.stages": 3,
    "vlmray.conversations": 4,
    "vlmray.adapters": 2,
    "vlmray.protocol": 1,
    "vlmray.gateway": 3,
    "vlmray.serving": 6,
    "vlmray.engines": 4,
    "vlmray.questions": 4,
    "vlmray.cluster": 4,
    "vlmray.training_run": 4,
    "vlmray.trainer": 4,
    "vlmray.sft_options": 5,
    "vlmray.training": 5,
    "vlmray.pipeline": 5,
    "vlmray.shards": 5,
    "vlmray.progress": 5,
    "vlmray.artifacts": 6,
    "vlmray.inference": 6,
    "vlmray.finetune": 7,
    "vlmray.demo": 7,
    "vlmray.cli": 7,
}
"""A module imports from its own level, without a cycle, or from below. A new module gets a line here."""

WITH_RAY = (
    "vlmray.cluster", "vlmray.inference", "vlmray.pipeline", "vlmray.shards", "vlmray.progress",
    "vlmray.finetune", "vlmray.demo", "vlmray.serving", "vlmray.benchmark",
)  # fmt: skip
"""Modules that may import Ray; all others run, and are tested, without."""

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


def test_every_module_is_in_the_table() -> None:
    assert sorted(MODULES) == sorted(LEVELS)


def test_imports_are_found() -> None:
    assert "vlmray.charts" in _imports("vlmray.sources")
    assert "vlmray.hub" in _imports("vlmray.sources")  # from vlmray import hub
    assert "vlmray.inference" in _imports("vlmray.cli")  # inside a function
    assert "vlmray" not in _imports("vlmray.sources")


@pytest.mark.parametrize("name", LEVELS)
def test_imports_only_go_down(name: str) -> None:
    above = {target for target in _imports(name) if LEVELS[target] > LEVELS[name]}
    assert not above, f"{name} (level {LEVELS[name]}) imports {', '.join(sorted(above))}"


def test_no_import_cycles() -> None:
    graph = {name: _imports(name) for name in MODULES}
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


def test_ray_is_imported_nowhere_else() -> None:
    without = [name for name in MODULES if name not in WITH_RAY]
    assert _loaded_by("\n".join(f"import {name}" for name in without), "ray") == []


def test_only_the_model_and_its_engine_import_torch() -> None:
    with_torch = (
        "model", "encoding", "vision", "vision_cache", "collator", "engines.transformers", "engines.cache",
        "engines.attention", "engines.linear", "engines.memory", "engines.sampling", "trainer", "training",
        "sft_options", "optimizers", "artifacts", "vqa_metrics.vqa_metrics",
    )  # fmt: skip
    heavy = (*(f"vlmray.{name}" for name in with_torch), *WITH_RAY)
    light = [name for name in MODULES if name not in heavy]
    loaded = _loaded_by("\n".join(f"import {name}" for name in light), "torch", "transformers", "datasets")
    assert loaded == []


@pytest.mark.parametrize(
    "name", ["vlmray", "vlmray.config", "vlmray.options", "vlmray.cli", "vlmray.schema", "vlmray.checkpoints"]
)
def test_what_help_needs_is_the_standard_library(name: str) -> None:
    heavy = ("torch", "ray", "transformers", "datasets", "pyarrow", "numpy", "PIL", "yaml", "huggingface_hub")
    assert _loaded_by(f"import {name}", *heavy) == []
