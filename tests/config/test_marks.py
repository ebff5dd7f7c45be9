"""Marks: every option says what it changes, and folders that were written before still go on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, get_args

import pytest

from vlmray.config import (
    BenchmarkConfig,
    DemoConfig,
    FinetuneConfig,
    InferConfig,
    QuestionsConfig,
    ServeConfig,
    options_that_affect,
)
from vlmray.config.marks import Effect, mark, option
from vlmray.config.parsing import build_config

CONFIGS = (
    InferConfig(sample_slices="[:]"),
    FinetuneConfig(),
    ServeConfig(),
    BenchmarkConfig(models="a=b"),
    DemoConfig(),
)
EFFECTS = get_args(Effect)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_every_option_is_marked_with_what_it_affects(config: Any) -> None:
    marks = {field.name: field.metadata.get("affects") for field in dataclasses.fields(config)}
    assert {name: affects for name, affects in marks.items() if affects not in EFFECTS} == {}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_an_option_has_one_effect(config: Any) -> None:
    parts = [options_that_affect(config, effect) for effect in EFFECTS]
    assert sum(map(len, parts)) == len(dataclasses.fields(config))
    assert options_that_affect(config, *EFFECTS) == {
        field.name: getattr(config, field.name) for field in dataclasses.fields(config)
    }


def test_an_option_without_a_mark_is_not_passed_over() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Forgetful(QuestionsConfig):
        marked: int = option(3, affects="speed")
        forgotten: int = 3

    with pytest.raises(KeyError, match="affects"):
        options_that_affect(Forgetful(), "speed")


SHARED = {
    "model_id", "quantization", "dtype", "min_pixels", "max_pixels", "dataset_name", "dataset_config",
    "dataset_split", "system_prompt", "seed",
}  # fmt: skip
ANSWERS = {"adapter", "engine", "max_new_tokens", "temperature", "top_p", "output_format"}
SAMPLING = {
    "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_new_tokens"
}  # fmt: skip
LATER = SAMPLING | {
    "endpoint", "engine_options", "max_model_len", "train_on", "chat_template", "chat_template_kwargs",
    "response_choices", "response_regex",
}  # fmt: skip
STEPS = {
    "sample_slices", "max_turns", "max_length", "use_peft", "lora_r", "lora_alpha", "lora_dropout",
    "lora_target_modules", "lora_vision", "lora_merger", "freeze_vision", "learning_rate", "num_train_epochs",
    "max_steps", "warmup_ratio", "lr_scheduler_type", "weight_decay", "optim", "bf16",
    "train_sampling_strategy", "sft_config",
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "names"),
    [(CONFIGS[0], SHARED | ANSWERS), (CONFIGS[1], SHARED | STEPS)],
    ids=["infer", "finetune"],
)
def test_folders_record_what_they_always_did(config: Any, names: set[str]) -> None:
    """A name less would have every folder refused that was written before, and so would one more, unless it
    is None where it is not given, as what an older folder does not record."""
    found = options_that_affect(config, "result")
    assert found.keys() - LATER == names
    assert all(found[name] is None for name in found.keys() & LATER)


def test_a_measurement_of_speed_holds_for_what_is_measured() -> None:
    config = BenchmarkConfig(models="a=b")
    measured = options_that_affect(config, "result", "derived", "rows", "speed").keys()
    assert {"models", "endpoint", "concurrency", "request_rate", "dtype", "attn_implementation"} <= measured
    assert not {"output_dir", "overwrite", "price_per_hour", "baseline", "metrics", "log_level"} & measured


@dataclass(frozen=True)
class Mappings:
    texts: dict[str, Any] | None = field(default=None, metadata=mark("result"))
    values: dict[str, Any] | None = field(default=None, metadata=mark("result", holds_json=True))


def test_a_mapping_of_a_yaml_file_holds_texts_unless_it_is_marked_as_json() -> None:
    written = {"a": "true", "b": ["1", "x"], "c": "1.10"}  # as the file's values are read
    config = build_config(Mappings, {"texts": written, "values": written})
    assert config.texts == written
    assert config.values == {"a": True, "b": [1, "x"], "c": 1.1}
