"""Options that an engine does not know are refused by it, whatever the job, and never ignored."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

import pytest

from vlmray.config import BenchmarkConfig, EngineConfig, InferConfig, ServeConfig
from vlmray.errors import OptionError

NEEDED: dict[type, dict[str, Any]] = {
    InferConfig: {"sample_slices": "[:]"},
    ServeConfig: {},
    BenchmarkConfig: {"models": "a=b"},
}
NEEDED_BY_ENGINE: dict[str, dict[str, Any]] = {"openai": {"endpoint": "http://127.0.0.1:9"}}
"""What each engine cannot do without."""
NEEDED_BY_OPTION: dict[tuple[type, str], dict[str, Any]] = {
    (InferConfig, "verify_adapter"): {"adapter": "a"},
    (ServeConfig, "verify_adapter"): {"adapters": "a=b"},
    (BenchmarkConfig, "verify_adapter"): {"models": "a=b+c"},
}

ENGINES = [each for each in typing.get_args(typing.get_type_hints(EngineConfig)["engine"]) if each != "auto"]
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
            given |= NEEDED_BY_OPTION.get((config_class, field.name), {})
            assert getattr(config_class(**given), field.name) == given[field.name]
            continue
        with pytest.raises(ValueError, match=rf"^--{field.name} is for --engine .*; --engine {engine} would"):
            config_class(**given)


def test_auto_leaves_the_engines_that_know_what_was_given() -> None:
    for config_class, field in MARKED:
        value = _other_value(config_class, field)
        given = {**NEEDED[config_class], field.name: value}
        given |= NEEDED_BY_OPTION.get((config_class, field.name), {})
        known = field.metadata["engines"]
        if known == ("openai",) and field.name != "endpoint":
            with pytest.raises(ValueError, match=rf"^--{field.name} is for --engine openai; pass the"):
                config_class(**given)
            given["endpoint"] = "http://127.0.0.1:9"
        possible, option = config_class(**given).possible_engines()
        assert possible == tuple(each for each in ("transformers", "vllm") if each in known) or known
        assert option in (*given, None)
    assert ServeConfig().possible_engines() == (("transformers", "vllm"), None)
    assert InferConfig(sample_slices="[:]").possible_engines() == (("transformers", "vllm"), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tensor_parallel_size": 2, "batch_size": 8},
            "--batch_size is for --engine transformers or openai, "
            "and --tensor_parallel_size for --engine vllm",
        ),
        (
            {"endpoint": "http://127.0.0.1:9", "dtype": "float32"},
            r"--endpoint is for --engine openai, and --dtype for --engine transformers or vllm",
        ),
        (
            {"attn_implementation": "eager", "max_model_len": 99},
            r"--max_model_len is for --engine vllm, and --attn_implementation for --engine transformers",
        ),
    ],
)
def test_options_of_two_engines_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=rf"^{message}; leave one of them out$"):
        InferConfig(sample_slices="[:]", **options)


def test_marks_name_engines_that_there_are() -> None:
    assert len({field.name for _, field in MARKED}) > 5
    for _, field in MARKED:
        assert set(field.metadata["engines"]) <= set(ENGINES), field.name
