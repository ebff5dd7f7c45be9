"""A run that goes on is the run that was never disturbed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.finetuning import (
    make_config,
    open_data,
    train,
)
from helpers.trainings import Interruption, assert_same_history, interrupted_at, logged
from vlmray.training.worker import Outcome

pytestmark = pytest.mark.usefixtures("spare_time")


def adapter_difference(one: Path, other: Path) -> float:
    weights, others = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert weights.keys() == others.keys()
    return max(float((weights[name] - others[name]).abs().max()) for name in weights)


@pytest.mark.parametrize(
    ("options", "interrupted"),
    [
        # Three steps an epoch, the last of each short.
        pytest.param({"save_steps": 3, "max_steps": 5}, 5, id="from the border between epochs"),
        pytest.param(
            {"save_steps": 4, "max_steps": 6, "per_device_train_batch_size": 1,
             "gradient_accumulation_steps": 2}, 6, id="from the middle of the second epoch",
        ),
        pytest.param({"save_steps": 100, "max_steps": 3}, 3, id="before any checkpoint"),
    ],
)  # fmt: skip
def test_a_resumed_run_equals_an_undisturbed_one(
    tiny_model: Path, tmp_path: Path, options: dict[str, Any], interrupted: int
) -> None:
    config = make_config(tiny_model, sample_slices="[:5]", lora_dropout=0.2, **options)
    expected = train(config, tmp_path / "whole")
    with pytest.raises(Interruption):
        train(config, tmp_path / "parts", worker_type=interrupted_at(interrupted))
    found = train(config, tmp_path / "parts")
    assert_same_history(found, expected)
    assert [entry["step"] for entry in logged(found)] == list(range(1, config.max_steps + 1))
    assert adapter_difference(tmp_path / "parts", tmp_path / "whole") < 1e-6
    done_before = (interrupted - 1) // config.save_steps * config.save_steps
    assert found.num_steps == config.max_steps
    assert (found.num_trained_here < expected.num_trained_here) == (done_before > 0)


@pytest.fixture(scope="module")
def evaluated(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Outcome, Path]:
    """A run with evaluations, one broken evaluation sample and answers, undisturbed."""
    config = make_config(
        tiny_model, sample_slices="[:6]", eval_split="validation", eval_slices="[:4]", eval_steps=2,
        eval_samples=3, save_steps=2, max_steps=5,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("evaluated") / "checkpoint"
    return config, train(config, folder, open_evaluated(config)), folder


def open_evaluated(config: Any) -> Any:
    return open_data(config, eval_rows={1: {"image": b"no picture"}})


def test_a_resumed_run_evaluates_no_step_twice(evaluated: tuple[Any, Outcome, Path], tmp_path: Path) -> None:
    config, expected, _ = evaluated
    with pytest.raises(Interruption):
        train(config, tmp_path / "parts", open_evaluated(config), interrupted_at(3))
    found = train(config, tmp_path / "parts", open_evaluated(config))
    assert_same_history(found, expected)
    assert [entry["step"] for entry in found.history if "eval_loss" in entry] == [0, 2, 4, 5]
    assert found.answered == expected.answered
    assert found.errors == expected.errors


def test_a_finished_run_is_not_trained_again_and_keeps_its_outcome(
    evaluated: tuple[Any, Outcome, Path],
) -> None:
    config, expected, folder = evaluated
    before = load_file(folder / "adapter_model.safetensors")
    of_others = {"train": {"train-000003": "left out by another worker"}, "evaluation": {}}
    (folder / "errors-1.json").write_text(json.dumps(of_others))
    again = train(config, folder, open_evaluated(config))
    assert (again.num_steps, again.num_trained_here) == (5, 0)
    assert_same_history(again, expected)
    assert again.answered == expected.answered
    assert [row["sample_id"] for row in again.answered] == ["validation-000000", "validation-000002"]
    assert list(again.eval_errors) == list(expected.eval_errors) == ["validation-000001"]
    assert again.errors == {**expected.errors, **of_others["train"]}
    assert all(torch.equal(before[name], weight) for name, weight in
               load_file(folder / "adapter_model.safetensors").items())  # fmt: skip


def test_early_stopping_leaves_a_checkpoint_of_its_last_step(tiny_model: Path, tmp_path: Path) -> None:
    config = make_config(
        tiny_model, max_steps=9, learning_rate=0, eval_slices="[60:]", eval_steps=1, save_steps=100,
        early_stopping_patience=2,
    )  # fmt: skip
    outcome = train(config, tmp_path)
    assert outcome.num_steps == 3
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 3
    again = train(config, tmp_path)
    assert_same_history(again, outcome)
    assert (again.num_steps, again.num_trained_here) == (3, 0)


def test_a_resumed_run_stops_early_where_an_undisturbed_one_does(tiny_model: Path, tmp_path: Path) -> None:
    config = make_config(
        tiny_model, max_steps=9, learning_rate=0, eval_slices="[60:]", eval_steps=1, save_steps=1,
        early_stopping_patience=3,
    )  # fmt: skip
    with pytest.raises(Interruption):
        train(config, tmp_path, worker_type=interrupted_at(4))
    outcome = train(config, tmp_path)
    assert outcome.num_steps == 4
    assert [entry["step"] for entry in outcome.history if "eval_loss" in entry] == [0, 1, 2, 3, 4]


def test_a_fully_trained_run_resumes(tiny_model: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model, max_steps=3, use_peft=False, save_steps=1)
    expected = train(config, tmp_path / "whole")
    with pytest.raises(Interruption):
        train(config, tmp_path / "parts", worker_type=interrupted_at(2))
    assert_same_history(train(config, tmp_path / "parts"), expected)
    weights, others = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.allclose(weights[name], others[name], atol=1e-6) for name in weights)
