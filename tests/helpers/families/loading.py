"""Write and load a tiny model."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from helpers.families import TINY
from helpers.families.building import write
from helpers.families.contract import Checkpoint
from vlmray.models.families import FAMILIES
from vlmray.models.loading import load_qwen_vl_model_and_processor


def load_tiny(name: str, folder: Path, **text: Any) -> Checkpoint:
    """Write and load one, unless a package that it needs is not here."""
    family = FAMILIES[name]
    missing = [package for package in family.needs if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"the processor of {name} needs {' and '.join(missing)}")
    recipe = TINY[name]()
    changed = {**recipe.config["text_config"], **text}
    recipe = dataclasses.replace(recipe, config={**recipe.config, "text_config": changed})
    write(recipe, folder)
    model, processor = load_qwen_vl_model_and_processor(str(folder))
    return Checkpoint(name=name, folder=folder, model=model, processor=processor, family=family)
