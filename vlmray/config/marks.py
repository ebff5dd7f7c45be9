"""What an option changes, and which engines know it, marked on its field.

What a folder is resumed or refused by, and what a measurement of speed holds for, is read off these marks, so
a new option cannot be forgotten there; neither can one that an engine would ignore.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeVar

from vlmray.errors import OptionError

T = TypeVar("T")

Effect = Literal["result", "derived", "rows", "speed", "run"]
"""result: answers, or weights that are trained; a folder goes on only with the same.
derived: so too, but what counts is what it comes to with the dataset or the cluster.
rows: which rows are answered; a folder may hold more of them.
speed: how fast.
run: nothing of that: where results go, what is kept and shown of them, when a run stops."""


def mark(affects: Effect, engines: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the metadata of a field whose option has an effect."""
    return {"affects": affects, "engines": engines}


def option(default: T, *, affects: Effect, engines: tuple[str, ...] = ()) -> T:
    """Make the field of an option.

    Args:
        default: Its value where it is not given.
        affects: What it changes.
        engines: Those that know it; none: it is no matter of engines, or all do.
    """
    return dataclasses.field(default=default, metadata=mark(affects, engines))


def options_that_affect(config: Any, *effects: Effect) -> dict[str, Any]:
    """Return those options of a config that have one of some effects."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.metadata["affects"] in effects
    }


def refuse_foreign_options(config: Any, engine: str) -> None:
    """Refuse an option that was given and that an engine would ignore.

    Raises:
        OptionError: There is one.
    """
    for field in dataclasses.fields(config):
        engines = field.metadata.get("engines")
        if engines and engine not in engines and getattr(config, field.name) != field.default:
            known = " and ".join(engines)
            raise OptionError(
                field.name, f"is for --engine {known}", f"--engine {engine} would ignore it; leave it out"
            )
