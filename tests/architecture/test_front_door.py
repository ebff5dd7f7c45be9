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
IMPORTS = re.compile(r"\bfrom (vlmray[\w.]*) import (\([^)]*\)|[\w, ]+)")

PUBLISHED = {
    "Sample", "GenerationRequest", "Completion",
    "InferConfig", "FinetuneConfig", "ServeConfig", "BenchmarkConfig",
    "load_hf_dataset", "DatasetSpec", "get_dataset_columns", "register_dataset", "parse_sample_slices",
    "format_data", "format_qwen_vl_messages", "load_image_pil", "ChartDataset", "parse_charts_name",
    "load_qwen_vl_model_and_processor", "generate_text_from_sample", "get_default_lora_config_for_qwen_vl",
    "merge_adapter", "Engine", "FakeEngine", "build_engine", "DataCollatorForVLMSFT", "train_loop_per_worker",
    "Task", "process_single_sample", "score",
    "plan_inference", "run_inference", "plan_finetune", "run_finetune", "serve_app", "plan_benchmark",
    "run_benchmark",
}  # fmt: skip
"""What users may have written into programs of their own."""


def test_what_was_published_is_offered() -> None:
    gone = sorted(PUBLISHED - set(vlmray.__all__))
    assert not gone, f"put them back into _HOMES of vlmray/__init__.py: users' programs import {gone}"
    new = sorted(set(vlmray.__all__) - PUBLISHED)
    assert not new, f"_HOMES of vlmray/__init__.py offers more; if that is meant, publish it here too: {new}"


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
    homes = {name: f"vlmray.{home}" for name, home in vlmray._HOMES.items()}
    wrong = sorted(name for name in seen | homes if seen.get(name) != homes.get(name))
    assert not wrong, f"_HOMES of vlmray/__init__.py and its block for type checkers differ in {wrong}"


@pytest.mark.parametrize("name", vlmray.__all__)
def test_every_name_is_there(name: str) -> None:
    home = importlib.import_module(f"vlmray.{vlmray._HOMES[name]}")
    assert hasattr(home, name), f"_HOMES of vlmray/__init__.py has {name} in {home.__name__}; it is not there"
    assert getattr(vlmray, name) is getattr(home, name)
    assert getattr(vlmray, name).__name__ == name


def test_a_name_is_no_folder() -> None:
    folders = {path.name for path in (ROOT / "vlmray").iterdir()} | {
        path.stem for path in (ROOT / "vlmray").glob("*.py")
    }
    both = folders & set(vlmray.__all__)
    assert not both, f"in _HOMES of vlmray/__init__.py and in vlmray/, so one hides the other; rename: {both}"
    with pytest.raises(AttributeError, match="module 'vlmray' has no attribute 'infer'"):
        vlmray.infer  # noqa: B018


def test_importing_it_costs_nothing() -> None:
    script = "import sys, vlmray; dir(vlmray); print(*(name for name in sys.modules if 'vlmray.' in name))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = sorted({*done.stdout.split()} - {"vlmray._lazy"})
    assert not loaded, f"vlmray/__init__.py imports them at once; put their names in _HOMES: {loaded}"


def find_names(path: Path) -> set[str]:
    text = path.read_text(encoding="utf-8")
    imported = {
        f"{module}.{name}"
        for module, names in IMPORTS.findall(text)
        for name in re.findall(r"(\w+)(?: as \w+)?", names)
    }
    return imported | set(NAMES.findall(text))


def test_what_the_documentation_names_is_there() -> None:
    names = {name: path for path in DOCUMENTED for name in find_names(path)}
    assert len(names) > 100
    gone = [
        f"{path.relative_to(ROOT)} speaks of {name}, which is not there: offer it again, or write what is"
        for name, path in sorted(names.items())
        if not is_there(name)
    ]
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
