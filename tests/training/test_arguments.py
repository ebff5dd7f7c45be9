"""Options of training, and fields of SFTConfig beside them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from trl import SFTConfig

from helpers.finetuning import (
    curve,
    make_config,
    open_data,
    train,
)
from vlmray.config import FinetuneConfig
from vlmray.errors import OptionError
from vlmray.training.arguments import _translate, parse_sft_config
from vlmray.training.run import TrainingRun
from vlmray.training.worker import LocalWorker, TrainingMistake

pytestmark = pytest.mark.usefixtures("spare_time")


def test_other_fields_of_sft_config_take_effect(tiny_model: Path) -> None:
    plain = curve(train(make_config(tiny_model, max_steps=3)))
    options = {"max_grad_norm": "1e-9", "logging_first_step": "true"}
    changed = curve(train(make_config(tiny_model, max_steps=3, optim="sgd", sft_config=options)))
    assert changed[0] == pytest.approx(plain[0])
    assert abs(changed[2] - plain[2]) > 1e-3


def test_values_are_converted_as_their_fields_say() -> None:
    given = {
        "max_grad_norm": "0.5", "logging_first_step": "true", "seed_worker": None, "adam_beta1": "0.8",
        "adam_beta2": 0.95, "torch_compile": False, "lr_scheduler_kwargs": {"min_lr": 1e-6},
        "logging_nan_inf_filter": "no", "neftune_noise_alpha": 5,
    }  # fmt: skip
    del given["seed_worker"]
    parsed = parse_sft_config(given)
    assert parsed.keys() == given.keys()
    assert parsed["max_grad_norm"] == 0.5
    assert parsed["logging_first_step"] is True
    assert parsed["torch_compile"] is False
    assert parsed["logging_nan_inf_filter"] is False
    assert parsed["adam_beta2"] == 0.95
    assert SFTConfig(output_dir="x", use_cpu=True, **parsed).lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert parse_sft_config(None) == parse_sft_config({}) == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": 1}, "learning_rate has an option of its own, --learning_rate"),
        ({"seed": 1}, "seed has an option of its own"),
        ({"completion_only_loss": False}, "completion_only_loss is set by vlmray"),
        ({"packing": True}, "packing is set by vlmray"),
        ({"max_grad_nrom": 1}, "no field 'max_grad_nrom'"),
        ({"max_grad_norm": "much"}, "max_grad_norm: invalid float value: 'much'"),
        ({"max_grad_norm": [1, 2]}, "unrecognized arguments|max_grad_norm"),
        ({"logging_first_step": "perhaps"}, "logging_first_step"),
        ({"optim": "sgd"}, "optim has an option of its own, --optim"),
    ],
)
def test_a_wrong_field_or_value_is_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        parse_sft_config(given)
    assert str(raised.value).startswith("--sft_config: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_target_modules": "q_prj"}, "no module of .* matches"),
        ({"lr_scheduler_type": "cosin"}, "cosin"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr or min_lr_rate"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        ({"sft_config": {"adam_beta1": 2}}, "Invalid beta"),
        ({"model_id": "/no/such/folder"}, "/no/such/folder"),
    ],
)
def test_a_mistake_is_found_before_training(tiny_model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingMistake, match=message) as raised:
        train(dataclasses.replace(make_config(tiny_model, max_steps=1), **options))
    assert "\n" not in str(raised.value)


def test_a_failure_of_training_itself_is_no_mistake_of_the_options(tiny_model: Path) -> None:
    class Worker(LocalWorker):
        def tell(self, **progress: Any) -> None:
            if progress.get("step") == 1:
                raise ValueError("lost")

    with pytest.raises(ValueError, match="lost") as raised:
        train(make_config(tiny_model, max_steps=2), worker_type=Worker)
    assert not isinstance(raised.value, TrainingMistake)


CHANGEABLE = {"gradient_checkpointing_kwargs", "logging_nan_inf_filter", "ddp_find_unused_parameters"}
"""What is set in another way than TRL does, and may be set again by `--sft_config`."""


def test_what_is_decided_here_cannot_be_changed_by_sft_config(tmp_path: Path) -> None:
    config = FinetuneConfig(
        dataset_name="charts?num_rows=4", optim="adamw_torch", fsdp=True, eval_split="test"
    )
    decided = (
        _translate(TrainingRun.of(config, open_data(config)), tmp_path, 1, goes_on=False).keys() - CHANGEABLE
    )
    assert len(decided) > 20
    for name in sorted(decided):
        with pytest.raises(OptionError, match=f"^--sft_config: {name} (has an option of its own|is set by)"):
            parse_sft_config({name: "1"})
