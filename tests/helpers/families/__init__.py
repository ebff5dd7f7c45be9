"""Tiny models of the families that are tested, one for each architecture."""

from __future__ import annotations

from collections.abc import Callable

from helpers.families import gemma, llava, others, qwen
from helpers.families.building import Tiny

TINY: dict[str, Callable[[], Tiny]] = {**qwen.TINY, **llava.TINY, **gemma.TINY, **others.TINY}
"""By the name of the family."""
