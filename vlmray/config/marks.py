"""What an option changes, marked on its field.

What a folder is resumed or refused by, and what a measurement of speed holds for, is read off these marks, so
a new option cannot be forgotten there.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeVar

T = TypeVar("T")

Effect = Literal["result", "derived", "rows", "speed", "run"]
"""result: answers, or weights that are trained; a folder goes on only with the same.
derived: so too, but what counts is what it comes to with the dataset or the cluster.
rows: which rows are answered; a folder may hold more of them.
speed: how fast.
run: nothing of that: where results go, what is kept and shown of them, when a run stops."""


def mark(affects: Effect) -> dict[str, Any]:
    """Return the metadata of a field whose option has an effect."""
    return {"affects": affects}


def option(default: T, *, affects: Effect) -> T:
    """Make the field of an option."""
    return dataclasses.field(default=default, metadata=mark(affects))


def options_that_affect(config: Any, *effects: Effect) -> dict[str, Any]:
    """Return those options of a config that have one of some effects."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.metadata["affects"] in effects
    }
