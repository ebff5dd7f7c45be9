"""Options that an engine does not know are refused by it, whatever the job, and never ignored."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

import pytest

from vlmray.config import BenchmarkConfig, EngineConfig, InferConfig, ServeConfig

NEEDED: dict[type, dict[str, Any]] = {
    InferConfig: {"sample_slices": "[:]"},
    ServeConfig: {},
    BenchmarkConfig: {"models": "a=b"},
}
NEEDED_BY_ENGINE: dict[str, dict[str, Any]] = {"openai": {"endpoint": "http://127.0.0.1:9"}}
"""What each engine cannot do without."""

ENGINES = typing.get_args(typing.get_type_hints(EngineConfig)["engine"])
MARKED = [
    (config_class, field)
    for config_class in NEEDED
    for field in dataclasses.fields(config_class)
    if field.metadata.get("engines")
]
OTHER_VALUES = {bool: True, int: 2, float: 1.0, str: "http://localhost:1"}


def _other_value(config_class: type, field: dataclasses.Field[Any]) -> Any:
    """A value that is not the default."""
    hint = typing.get_type_hints(config_class)[field.name]
    kind = next((arg for arg in typing.get_args(hint) if arg is not types.NoneType), hint)
    if typing.get_origin(hint) is typing.Literal:
        return next(value for value in typing.get_args(hint) if value != field.default)
    return {"a": 1} if typing.get_origin(kind) is dict else OTHER_VALUES[kind]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_refuses_what_it_would_ignore_and_takes_the_rest(engine: str) -> None:
    for config_class, field in MARKED:
        names = {each.name for each in dataclasses.fields(config_class)}
        needed = {name: value for name, value in NEEDED_BY_ENGINE.get(engine, {}).items() if name in names}
        value = _other_value(config_class, field)
        given = {"engine": engine, **NEEDED[config_class], **needed, field.name: value}
        if config_class is BenchmarkConfig and field.name == "endpoint":
            continue  # which says itself that a server answers
        if engine in field.metadata["engines"]:
            assert getattr(config_class(**given), field.name) == given[field.name]
            continue
        with pytest.raises(ValueError, match=rf"^--{field.name} is for --engine .*; --engine {engine} would"):
            config_class(**given)


def test_marks_name_engines_that_there_are() -> None:
    assert len({field.name for _, field in MARKED}) > 5
    for _, field in MARKED:
        assert set(field.metadata["engines"]) <= set(ENGINES), field.name
