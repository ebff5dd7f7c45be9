"""What is special about a family of models, a few lines each.

A new family is a `Family` in one of these files, and a tiny model of it in tests/helpers/families.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmray.models.families import gemma, glm, idefics, llava, mllama, others, qwen
from vlmray.models.families.base import Family

FAMILIES: dict[str, Family] = {
    model_type: family
    for file in (qwen, glm, llava, idefics, gemma, mllama, others)
    for family in file.FAMILIES
    for model_type in family.model_types
}
"""Those that are tested, by the model type that a config names."""

ANY = Family()
"""Of which only what holds for all is known."""


def family_of(config: Any) -> Family:
    """Return what is known of a model.

    Args:
        config: As transformers has it, or the content of a `config.json`.
    """
    model_type = _read(config, "model_type")
    if model_type == "llava" and _read(_read(config, "vision_config"), "model_type") == "pixtral":
        model_type = "pixtral"  # which has no name of its own
    return FAMILIES.get(str(model_type), ANY)


def _read(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
