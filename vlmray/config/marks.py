"""What an option changes, and which engines know it, marked on its field.

What a folder is resumed or refused by, and what a measurement of speed holds for, is read off these marks, so
a new option cannot be forgotten there; neither can one that an engine would ignore.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from vlmray.errors import OptionError

T = TypeVar("T")

Effect = Literal["result", "derived", "rows", "speed", "run"]
"""result: answers, or weights that are trained; a folder goes on only with the same.
derived: so too, but what counts is what it comes to with the dataset or the cluster.
rows: which rows are answered; a folder may hold more of them.
speed: how fast.
run: nothing of that: where results go, what is kept and shown of them, when a run stops."""


def mark(affects: Effect, engines: tuple[str, ...] = (), *, holds_json: bool = False) -> dict[str, Any]:
    """Return the metadata of a field whose option has an effect.

    Args:
        affects: What it changes.
        engines: As of `option`.
        holds_json: It is a mapping to JSON values, and not to texts that something else converts; or a text
            that may be JSON, which a mapping of a YAML file becomes.
    """
    return {"affects": affects, "engines": engines, "holds_json": holds_json}


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
    for name, engines in given_for_engines(config).items():
        if engine not in engines:
            raise OptionError(
                name,
                f"is for --engine {' and '.join(engines)}",
                f"--engine {engine} would ignore it; leave it out",
            )


def known_options(config_class: Any, options: Mapping[str, Any], engine: str) -> dict[str, Any]:
    """Return those options of a config that an engine knows: defaults of one job are no wish in another."""
    foreign = {
        field.name
        for field in dataclasses.fields(config_class)
        if (engines := field.metadata.get("engines")) and engine not in engines
    }
    return {name: value for name, value in options.items() if name not in foreign}


def narrow_engines(config: Any, engines: Sequence[str]) -> tuple[tuple[str, ...], str | None]:
    """Return those of some engines that know all options that were given, and the option that decided.

    Raises:
        OptionError: Two options leave none.
    """
    given = {
        name: left
        for name, known in given_for_engines(config).items()
        if (left := tuple(engine for engine in engines if engine in known))
    }
    left, decisive = tuple(engines), None
    for name, known in given.items():
        both = tuple(engine for engine in left if engine in known)
        if not both:
            other = next(each for each in given if each == decisive or not {*given[each]} & {*known})
            theirs, mine = (" or ".join(given[each]) for each in (other, name))
            problem = f"is for --engine {mine}, and --{other} for --engine {theirs}"
            raise OptionError(name, problem, "leave one of them out")
        if both != left:
            left, decisive = both, name
    return left, decisive


def given_for_engines(config: Any) -> dict[str, tuple[str, ...]]:
    """Return the options that were given and that not all engines know, with those that do."""
    return {
        field.name: field.metadata["engines"]
        for field in dataclasses.fields(config)
        if field.metadata.get("engines") and getattr(config, field.name) != field.default
    }
