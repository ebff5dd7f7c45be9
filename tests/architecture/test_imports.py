"""The shape of the package: who may import whom, on how many floors, where Ray and torch are."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
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
    "protocol": (),
    "publishing": (),
    "models": ("config", "storage", "builtin", "protocol"),
    "dataset": ("config", "storage", "images", "builtin", "metrics", "models", "protocol"),
    "engines": ("config", "images", "builtin", "models", "protocol"),
    "inference": (
        "config", "storage", "images", "reports", "builtin", "metrics", "models", "dataset", "engines",
        "cluster", "protocol", "publishing",
    ),
    "training": (
        "config", "storage", "images", "builtin", "metrics", "models", "dataset", "engines", "protocol",
    ),
    "serving": ("config", "storage", "images", "builtin", "models", "engines", "cluster", "protocol"),
    "finetune": (
        "config", "storage", "images", "reports", "builtin", "metrics", "models", "dataset", "engines",
        "training",
        "cluster", "publishing",
    ),
    "benchmark": (
        "config", "storage", "images", "reports", "builtin", "metrics", "models", "dataset", "engines",
        "inference",
        "serving", "cluster", "publishing",
    ),
    "demo": ("config", "storage", "reports", "builtin", "finetune", "benchmark"),
    "cluster": (),
    "terminal": (),
    "stages": ("inference",),
    "cli": ("config", "inference", "finetune", "serving", "benchmark", "demo", "cluster", "terminal"),
}  # fmt: skip
"""Folders, and modules beside them, with what each may import beside itself and the ground. A new folder gets
a line here; wings that stand side by side (inference, training, serving) do not know each other."""

WITH_RAY = {
    "cluster", "cluster.connection", "cluster.resources", "cluster.placement", "cluster.plans",
    "cluster.preview", "cluster.probing", "cluster.waiting", "cluster.watch", "cluster.causes",
    "cluster.ending",
    "inference.job", "inference.pipeline", "inference.replica", "inference.endpoint.keeping",
    "inference.endpoint.watching", "inference.reuse.keeping",
    "finetune.plan", "finetune.job", "finetune.progress", "finetune.ray_worker",
    "serving.server", "serving.replica", "serving.presence", "serving.handles", "benchmark.job",
    "benchmark.asking", "benchmark.suite.job", "demo.job",
}  # fmt: skip
"""Modules that may import Ray; all others run, and are tested, without."""

WITH_TORCH = {
    "models.adapters", "models.loading", "models.inputs", "models.vision", "models.processors",
    "models.prompts", "models.families.answers", "models.families.patch_embedding",
    "training.worker", "training.trainer", "training.evaluation", "training.checkpoint",
    "training.collator", "training.vision_cache", "training.arguments", "training.optimizers",
    "engines.transformers.engine", "engines.transformers.attention", "engines.transformers.cache",
    "engines.transformers.linear", "engines.transformers.memory", "engines.transformers.sampling",
    "engines.transformers.in_flight", "engines.transformers.batching", "engines.transformers.forward",
    "engines.transformers.settings", "engines.transformers.grammars",
    "engines.vllm.engine", "engines.vllm.requests", "engines.vllm.running", "engines.vllm.sampling",
    "engines.vllm.adapters", "engines.verifying",
    "finetune.artifacts", "finetune.checks",
    "metrics.vqa_metrics.vqa_metrics",
}  # fmt: skip
"""Modules that may import torch, transformers or datasets, beside those with Ray."""

TORCH = ("torch", "transformers", "datasets")

OUTSIDE = ("jobs", "benchmarks", "tests", "helpers")

MAX_FLOORS = 9
"""Counted from the ground to the command line."""


def _modules() -> dict[str, Path]:
    names = {}
    for path in sorted((ROOT / "vlmray").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = _modules()


def _imports(name: str) -> set[str]:
    """Return the modules of the package that a module imports, inside functions too."""
    found = {target for node in _nodes(name) for target in _targets(node)}
    return {target for target in found if target in MODULES} - {name}


@functools.cache
def _nodes(name: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))))


def _place(name: str, node: ast.AST | None = None) -> str:
    """Return where a module is, or something in it, as editors open it."""
    line = f":{node.lineno}" if isinstance(node, ast.stmt | ast.expr) else ""
    return f"{MODULES[name].relative_to(ROOT)}{line}"


def _targets(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=aliases):
            yield from (alias.name for alias in aliases)
        case ast.ImportFrom(module=str(module), level=0, names=aliases):
            submodules = [f"{module}.{alias.name}" for alias in aliases]
            yield from (target if target in MODULES else module for target in submodules)


def _room(module: str) -> str:
    """Return the folder that a module is in, or its own name where it stands beside them."""
    return module.split(".")[1] if "." in module else module


def test_every_folder_is_in_the_table() -> None:
    rooms = {_room(name) for name in MODULES} - {"vlmray", *GROUND}
    missing, gone = sorted(rooms - MAY_IMPORT.keys()), sorted(MAY_IMPORT.keys() - rooms)
    assert not missing, f"say in MAY_IMPORT what these of vlmray/ may import: {missing}"
    assert not gone, f"their lines in MAY_IMPORT can go, they are not in vlmray/: {gone}"


def _circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Return what imports itself, in the end; nothing where there is no circle."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]  # who imports comes first
    return []


def test_the_table_has_no_circle() -> None:
    circle = _circle(MAY_IMPORT)
    assert not circle, f"MAY_IMPORT lets folders import in a circle; one may not: {' -> '.join(circle)}"


def test_there_are_few_floors() -> None:
    if _circle(MAY_IMPORT):
        pytest.skip("a circle has no floors")
    floors = dict.fromkeys(GROUND, 1)
    for room in graphlib.TopologicalSorter(MAY_IMPORT).static_order():
        floors[room] = 1 + max(floors[below] for below in (*GROUND, *MAY_IMPORT[room]))
    high = [f"vlmray/{room} is on floor {floor}" for room, floor in floors.items() if floor > MAX_FLOORS]
    assert not high, f"{', '.join(high)}; {MAX_FLOORS} are the most: let it, or one below, import less"


def _documented_floors() -> dict[str, int]:
    """Return on which floor CONTRIBUTING.md puts each folder."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("| floor | folders | rule |\n", 1)[1].split("\n\n", 1)[0]
    cells = [row.split("|")[2] for row in table.splitlines()[1:]]
    floors = [re.findall(r"`(\w+)`", part) for cell in cells for part in cell.split(", then")]
    return {room: floor for floor, rooms in enumerate(floors) for room in rooms}


def test_no_arrow_leads_up() -> None:
    floors = _documented_floors()
    folders = {room for room in MAY_IMPORT if (ROOT / "vlmray" / room).is_dir()}
    assert floors.keys() == folders, "the floors of CONTRIBUTING.md have to name the folders of vlmray/"
    arrows = {(room, target) for room in folders for target in folders & set(MAY_IMPORT[room])}
    wrong = {arrow for arrow in arrows if floors[arrow[0]] <= floors[arrow[1]]} - {("builtin", "storage")}
    assert not wrong, "\n".join(
        f"MAY_IMPORT lets vlmray/{room}/ import vlmray/{target}/, which is on no lower floor of "
        "CONTRIBUTING.md; move what both need further down"
        for room, target in sorted(wrong)
    )


def test_imports_are_written_in_full() -> None:
    found = [
        f"{_place(name, node)}: {hides}"
        for name in MODULES
        for node in _nodes(name)
        if (hides := _hides(name, node))
    ]
    assert not found, "\n".join(found)


def _hides(name: str, node: ast.AST) -> str:
    """Say what is wrong with an import whose direction the other tests cannot see."""
    match node:
        case ast.ImportFrom(level=level) if level > 0:
            return "relative imports hide the direction; write the module's full name"
        case ast.ImportFrom(module=str(module), names=aliases) if f"{name}.".startswith(f"{module}."):
            offered = [alias.name for alias in aliases if f"{module}.{alias.name}" not in MODULES]
            if {*offered} - {"__version__"}:
                return f"front doors are for others; import {', '.join(offered)} from the module that has it"
        case ast.Import(names=aliases) if any(alias.name == "vlmray" for alias in aliases):
            return "the front door is for others; import the module that has what is needed"
        case ast.Import(names=aliases) | ast.ImportFrom(names=aliases) if name != "vlmray._lazy":
            if any(target.split(".")[0] in OUTSIDE for target in _targets(node)):
                return f"the package stands without {', '.join(OUTSIDE)}; move what it needs into vlmray/"
        case ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"):
            if name != "vlmray._lazy":
                return "modules that are named by strings hide the direction; write an import"
    return ""


def test_imports_are_found() -> None:
    assert "vlmray.builtin.charts" in _imports("vlmray.dataset.sources")
    assert "vlmray.storage.hub" in _imports("vlmray.dataset.huggingface")  # from vlmray.storage import hub
    assert "vlmray.inference.job" in _imports("vlmray.cli")  # inside a function
    assert "vlmray" not in _imports("vlmray.dataset.sources")


@pytest.mark.parametrize("room", [*GROUND, *MAY_IMPORT])
def test_a_folder_imports_what_it_may(room: str) -> None:
    allowed = {"vlmray", room, *GROUND, *MAY_IMPORT.get(room, ())}
    found = {
        (name, target)
        for name in MODULES
        if _room(name) == room
        for target in _imports(name)
        if _room(target) not in allowed
    }
    assert not found, "\n".join(
        f"{_place(name)} imports {target}, which {room} may not; move what both need further down, or let "
        "MAY_IMPORT say that it may"
        for name, target in sorted(found)
    )


def test_no_import_cycles() -> None:
    # The front door names everything, for type checkers alone.
    graph = {name: _imports(name) - {"vlmray"} for name in MODULES if name != "vlmray"}
    circle = [_place(name) for name in _circle(graph)]
    assert not circle, (
        f"these import each other; move what both need into a module of its own: {' -> '.join(circle)}"
    )


WATCH = """
import sys
from pathlib import Path

class Watch:
    by = {}

    @classmethod
    def find_spec(cls, name, *_):
        frame = sys._getframe() if name in NAMES else None
        while frame and not str(frame.f_globals.get("__name__")).startswith("vlmray"):
            frame = frame.f_back
        if frame:
            place = Path(frame.f_code.co_filename).relative_to(ROOT)
            cls.by[name] = f"{place}:{frame.f_lineno} loads {name}"

sys.meta_path.insert(0, Watch)
"""
"""Notes the line of the package that has a library loaded; the last who asked for it did."""


def _loaded_by(statements: str, *names: str) -> list[str]:
    """Return which of `names` a clean interpreter has loaded after some statements, and the line that did."""
    script = (
        f"NAMES, ROOT = {names!r}, {str(ROOT)!r}\n{WATCH}\n{statements}\n"
        "print(*(Watch.by.get(name, name) for name in NAMES if name in sys.modules), sep='\\n', end='')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def _full(names: set[str]) -> set[str]:
    return {f"vlmray.{name}" for name in names}


def _says(loaded: list[str], table: str) -> str:
    return "\n".join(f"{line}; import it elsewhere, or name the module in {table}" for line in loaded)


def test_ray_is_imported_nowhere_else() -> None:
    without = [name for name in MODULES if name not in _full(WITH_RAY)]
    loaded = _loaded_by("\n".join(f"import {name}" for name in without), "ray")
    assert not loaded, _says(loaded, "WITH_RAY")


def test_ray_is_in_no_function_elsewhere() -> None:
    found = [
        f"{_place(name, node)} imports ray"
        for name in MODULES.keys() - _full(WITH_RAY)
        for node in _nodes(name)
        if "ray" in _libraries([node])
    ]
    assert not found, _says(sorted(found), "WITH_RAY")


def test_torch_is_imported_nowhere_else() -> None:
    light = [name for name in MODULES if name not in _full(WITH_RAY | WITH_TORCH)]
    loaded = _loaded_by("\n".join(f"import {name}" for name in light), *TORCH)
    assert not loaded, _says(loaded, "WITH_TORCH") + " (or import it inside the function that needs it)"


def test_tasks_that_read_rows_load_no_parser_of_requests() -> None:
    """Each of their processes would pay for it."""
    loaded = _loaded_by("import vlmray.dataset.rows, vlmray.inference.stages", "pydantic", "jinja2")
    assert not loaded, "\n".join(loaded)


@pytest.mark.parametrize(
    ("table", "listed", "libraries"),
    [("WITH_RAY", WITH_RAY, ("ray",)), ("WITH_TORCH", WITH_TORCH, TORCH)],
    ids=["ray", "torch"],
)
def test_the_exceptions_are_no_more_than_needed(
    table: str, listed: set[str], libraries: tuple[str, ...]
) -> None:
    full = _full(listed)
    gone = sorted(full - MODULES.keys())
    assert not gone, f"take them out of {table}, they are not there: {gone}"
    without = [
        _place(name)
        for name in sorted(full)
        if not _libraries(_nodes(name)) & set(libraries) and not _imports(name) & full
    ]
    assert not without, f"take them out of {table}, they import no {' or '.join(libraries)}: {without}"


def _libraries(nodes: Iterable[ast.AST]) -> set[str]:
    return {target.split(".")[0] for node in nodes for target in _targets(node)}


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
    loaded = _loaded_by(f"import {name}", *heavy)
    assert not loaded, "\n".join(
        f"{line}, and so does `import {name}`; import it inside the function that needs it" for line in loaded
    )
