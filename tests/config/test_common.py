"""The jobs' options: each has help, a range, and no contradiction goes unnoticed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from vlmray.config import (
    BenchmarkConfig,
    DemoConfig,
    FinetuneConfig,
    InferConfig,
    LoadingConfig,
    ModelConfig,
    QuestionsConfig,
    ReplicaConfig,
    ServeConfig,
)
from vlmray.config.parsing import field_docs, parse_args

NAN = float("nan")


@pytest.mark.parametrize(
    "config_class", [InferConfig, FinetuneConfig, ServeConfig, BenchmarkConfig, DemoConfig]
)
def test_every_option_has_help(config_class: type, capsys: pytest.CaptureFixture[str]) -> None:
    docs = field_docs(config_class)
    for field in dataclasses.fields(config_class):
        doc = docs.get(field.name, "")
        assert len(doc) > 10, field.name
        assert doc.endswith((".", "'")), field.name
        assert "\n" not in doc
    with pytest.raises(SystemExit):
        parse_args(config_class, ["--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(config_class):
        assert shown.count(f"\n  --{field.name} ") == 1, field.name


def test_the_jobs_share_their_options_about_questions() -> None:
    shared = field_docs(QuestionsConfig)
    assert len(shared) > 10
    for config_class in (InferConfig, FinetuneConfig):
        docs = field_docs(config_class)
        assert {name: docs[name] for name in shared} == shared
        assert len(docs) > len(shared)


@pytest.mark.parametrize(
    ("config_class", "missing"),
    [(BenchmarkConfig, {"model_id", "metric"}), (FinetuneConfig, {"engine", "num_replicas"})],
)
def test_a_job_has_only_options_that_mean_something_to_it(config_class: type, missing: set[str]) -> None:
    assert not missing & {field.name for field in dataclasses.fields(config_class)}


@pytest.mark.parametrize("mixin", [ModelConfig, LoadingConfig, ReplicaConfig])
def test_options_of_a_kind_are_written_once(mixin: type) -> None:
    """Help, type and default come from the mixin."""
    for config_class in (InferConfig, FinetuneConfig, ServeConfig, BenchmarkConfig):
        if issubclass(config_class, mixin):
            docs = field_docs(config_class)
            assert {name: docs[name] for name in field_docs(mixin)} == field_docs(mixin)
            assert not set(config_class.__annotations__) & field_docs(mixin).keys()


def test_the_model_comes_first_in_the_help() -> None:
    for config_class in (InferConfig, FinetuneConfig, ServeConfig):
        assert dataclasses.fields(config_class)[0].name == "model_id"


# Ranges


def _mistake(config_class: type, **options: Any) -> str:
    with pytest.raises(ValueError, match="--") as error_info:
        config_class(**options)
    assert "\n" not in str(error_info.value)
    return str(error_info.value)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("max_new_tokens", 0, "--max_new_tokens must be at least 1, got 0"),
        ("batch_size", -2, "--batch_size must be at least 1, got -2"),
        ("temperature", -0.1, "--temperature must be at least 0, got -0.1"),
        ("temperature", NAN, "--temperature must be at least 0, got nan"),
        ("top_p", 0.0, "--top_p must be above 0 and at most 1, got 0.0"),
        ("top_p", 1.5, "--top_p must be above 0 and at most 1, got 1.5"),
        ("max_errors", -1, "--max_errors must be at least 0, got -1"),
        ("num_replicas", "0", "--num_replicas must be N or MIN,MAX of at least 1, got '0'"),
        ("num_replicas", "3,2", "--num_replicas must be N or MIN,MAX of at least 1, got '3,2'"),
        ("num_replicas", "1,2,3", "--num_replicas must be N or MIN,MAX of at least 1, got '1,2,3'"),
        ("num_replicas", "many", "--num_replicas must be N or MIN,MAX of at least 1, got 'many'"),
        ("dataset_name", "", "--dataset_name is empty"),
        ("output_dir", "", "--output_dir is empty"),
        ("adapter", "", "--adapter is empty"),
    ],
)
def test_values_out_of_range(option: str, value: object, message: str) -> None:
    assert _mistake(InferConfig, sample_slices="[:]", **{option: value}) == message


@pytest.mark.parametrize(
    ("least", "names"),
    [
        (
            1,
            "max_turns max_length eval_steps max_new_tokens lora_r lora_alpha per_device_train_batch_size "
            "per_device_eval_batch_size gradient_accumulation_steps logging_steps save_steps "
            "save_total_limit early_stopping_patience min_pixels max_pixels",
        ),
        (0, "eval_samples learning_rate weight_decay max_failures seed max_errors"),
    ],
)
def test_least_values_of_training(least: int, names: str) -> None:
    for name in names.split():
        FinetuneConfig(eval_split="validation", **{name: least})
        for value in (least - 1, NAN):
            message = _mistake(FinetuneConfig, eval_split="validation", **{name: value})
            assert message == f"--{name} must be at least {least}, got {value}"


@pytest.mark.parametrize("value", ["0", "3,2", "1,2,3", "many", 0, "1.5"])
def test_workers_are_a_number_or_a_range(value: Any) -> None:
    assert _mistake(FinetuneConfig, num_workers=value) == (
        f"--num_workers must be N or MIN,MAX of at least 1, got {value!r}"
    )
    assert FinetuneConfig(num_workers="1,4").worker_range() == (1, 4)
    assert FinetuneConfig(num_workers="2").worker_range() == (2, 2)
    assert FinetuneConfig().worker_range() is None


def test_shards_do_not_come_and_go() -> None:
    FinetuneConfig(num_workers="2", fsdp=True)
    assert _mistake(FinetuneConfig, num_workers="1,2", fsdp=True).startswith("--num_workers 1,2 lets workers")


@pytest.mark.parametrize(
    ("option", "good", "bad", "expected"),
    [
        ("lora_dropout", (0, 0.99), (-0.1, 1, NAN), "must be at least 0 and below 1"),
        ("warmup_ratio", (0, 0.99), (-0.1, 1, NAN), "must be at least 0 and below 1"),
        ("max_steps", (-1, 1), (0, -2), "must be -1 (not set) or at least 1"),
        ("num_train_epochs", (0.01, 3), (0, -1, NAN), "must be above 0"),
    ],
)
def test_ranges_of_training(option: str, good: Any, bad: Any, expected: str) -> None:
    for value in good:
        FinetuneConfig(**{option: value})
    for value in bad:
        assert _mistake(FinetuneConfig, **{option: value}) == f"--{option} {expected}, got {value}"


def test_only_the_system_prompt_may_be_empty() -> None:
    FinetuneConfig(system_prompt="")
    for field in dataclasses.fields(FinetuneConfig):
        if field.type in ("str", "str | None") and field.name != "system_prompt":
            assert _mistake(FinetuneConfig, **{field.name: ""}) == f"--{field.name} is empty"


def test_pixel_bounds_and_an_empty_system_prompt() -> None:
    for config_class, options in ((InferConfig, {"sample_slices": "[:]"}), (FinetuneConfig, {})):
        config_class(min_pixels=5, max_pixels=5, system_prompt="", **options)
        message = _mistake(config_class, min_pixels=6, max_pixels=5, **options)
        assert message == "--min_pixels 6 is above --max_pixels 5"


@pytest.mark.parametrize(("text", "expected"), [(None, None), ("1", (1, 1)), ("4", (4, 4)), ("1,4", (1, 4))])
def test_replica_range(text: str | None, expected: tuple[int, int] | None) -> None:
    assert InferConfig(sample_slices="[:]", num_replicas=text).replica_range() == expected


def test_only_a_server_may_have_no_replica() -> None:
    assert ServeConfig(num_replicas="0,2").replica_range() == (0, 2)
    for config_class, options in (
        (InferConfig, {"sample_slices": "[:]"}),
        (BenchmarkConfig, {"models": "a=b"}),
    ):
        message = _mistake(config_class, num_replicas="0,2", **options)
        assert message == "--num_replicas must be N or MIN,MAX of at least 1, got '0,2'"
    assert _mistake(ServeConfig, num_replicas="0") == (
        "--num_replicas must be N or MIN,MAX of at least 0,1, got '0'"
    )


# Contradictions


@pytest.mark.parametrize(
    ("options", "message", "cure"),
    [
        *(
            ({"use_peft": False, name: value}, f"--{name} is about LoRA", {"use_peft": True})
            for name, value in {
                "lora_target_modules": "q_proj",
                "lora_vision": True,
                "lora_merger": True,
                "merge_adapter": True,
            }.items()
        ),
        ({"use_peft": False, "quantization": "8bit"}, "--quantization 8bit needs LoRA", {"use_peft": True}),
        ({"use_peft": False, "quantization": "4bit"}, "--quantization 4bit needs", {"quantization": "none"}),
        ({"freeze_vision": True}, "--freeze_vision is for --use_peft false", {"use_peft": False}),
        (
            {"early_stopping_patience": 2},
            "--early_stopping_patience needs an evaluation",
            {"eval_slices": "[:9]"},
        ),
        (
            {"load_best_model_at_end": True},
            "--load_best_model_at_end needs an evaluation",
            {"eval_split": "validation"},
        ),
        (
            {"load_best_model_at_end": True, "eval_split": "validation", "save_steps": 10, "eval_steps": 20},
            "--load_best_model_at_end needs --save_steps 10 equal to --eval_steps 20",
            {"eval_steps": 10},
        ),
        ({"resume": True, "overwrite": True}, "--resume keeps what --overwrite", {"overwrite": False}),
    ],
)
def test_contradictions_are_refused(options: Any, message: str, cure: Any) -> None:
    assert _mistake(FinetuneConfig, **options).startswith(message)
    FinetuneConfig(**{**options, **cure})


def test_either_option_turns_the_evaluation_on() -> None:
    assert not FinetuneConfig().evaluates
    assert not FinetuneConfig(eval_samples=5, eval_steps=5).evaluates
    assert FinetuneConfig(eval_split="validation").evaluates
    assert FinetuneConfig(eval_slices="[-9:]").evaluates


@pytest.mark.parametrize(
    "origins", ["https://a.example/", "a.example", "https://a.example/b", "https://", "a b"]
)
def test_what_is_no_origin_is_refused(origins: str) -> None:
    with pytest.raises(ValueError, match="--allowed_origins has"):
        ServeConfig(allowed_origins=f"http://localhost:3000,{origins}")
    config = ServeConfig(allowed_origins="https://a.example, http://127.0.0.1:3000,http://[::1]:5,app://x")
    assert config.origins() == ["https://a.example", "http://127.0.0.1:3000", "http://[::1]:5", "app://x"]
    assert ServeConfig().origins() == []
