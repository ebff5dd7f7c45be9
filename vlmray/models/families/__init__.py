"""What is special about a family of models, a short file each.

A new family is a subclass of `vlmray.models.families.base.Family` and a line in `FAMILIES`.
"""

from __future__ import annotations

from vlmray.models.families.base import Family
from vlmray.models.families.qwen2_5_vl import Qwen25VL

FAMILIES: dict[str, Family] = {"qwen2_5_vl": Qwen25VL()}
"""Those of which something is known, by the model type that a config names."""

_ANY = Family()


def family_of(model_type: str) -> Family:
    """Return what is known of models of a type; of most, only what holds for all."""
    return FAMILIES.get(model_type, _ANY)
