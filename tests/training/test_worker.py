"""A run in one process: TRL's own losses, exact resume and evaluation, no sample lost unnoticed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, set_seed
from trl import SFTConfig, SFTTrainer

from helpers.finetuning import (
    END,
    curve,
    make_config,
    mean_loss,
    open_data,
    read_features,
    train,
)
from helpers.trainings import PIXELS, Interruption, differ, interrupted_at, spoil
from vlmray.models.lora import get_default_lora_config_for_qwen_vl
from vlmray.models.processors import load_processor
from vlmray.training import trainer
from vlmray.training.run import TrainingRun
from vlmray.training.trainer import DivergedError, NothingLearnedError
from vlmray.training.worker import LocalWorker, Outcome, WorkerSession, train_loop_per_worker

pytestmark = pytest.mark.usefixtures("spare_time")


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    return load_processor(str(tiny_model), max_pixels=PIXELS)


def train_with_trl_alone(
    config: Any, processor: Any, samples: list[dict[str, Any]], folder: Path
) -> list[float]:
    """The losses of a script without vlmray: TRL's trainer and collator, samples in the given order."""
    rows = [
        {
            "prompt": processor.apply_chat_template(sample["messages"][:-1], add_generation_prompt=True),
            "completion": sample["messages"][-1]["content"][0]["text"] + END,
            "images": sample["images"],
        }
        for sample in samples
    ]
    arguments = SFTConfig(
        output_dir=str(folder), max_steps=config.max_steps, seed=config.seed, use_cpu=True, bf16=False,
        per_device_train_batch_size=config.per_device_train_batch_size, max_length=None,
        learning_rate=config.learning_rate, lr_scheduler_type="cosine", logging_steps=1,
        train_sampling_strategy="sequential", gradient_checkpointing=False, save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    set_seed(config.seed)
    trainer = SFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(config.model_id),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        peft_config=get_default_lora_config_for_qwen_vl(lora_dropout=0.0),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_every_loss_of_20_steps_is_that_of_trl_alone(
    tiny_model: Path, processor: Any, tmp_path: Path
) -> None:
    config = make_config(tiny_model, sample_slices="[:24]", max_steps=20, seed=3)
    data = open_data(config)
    plan = TrainingRun.of(config, data).plan("train", 1)
    order = [index for batch in plan.batches(0, 0, 20) for index in batch]
    assert len(order) == 40
    assert order[:24] != sorted(order[:24])
    expected = train_with_trl_alone(config, processor, read_features(data.train, order), tmp_path)
    found = curve(train(config, data=data))
    difference = differ(found, expected)
    print(f"largest difference from TRL alone over 20 steps: {difference:.2g}")
    assert difference < 1e-4
    assert found[-1] < found[0] - 1  # both learn; a constant would say nothing


def test_the_head_scores_no_position_without_a_label(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []
    original = trl.trainer.utils._ChunkedLogProbFunction

    class Counting:
        @staticmethod
        def apply(hidden: torch.Tensor, *args: Any) -> Any:
            scored.append(hidden.shape[0])
            return original.apply(hidden, *args)

    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Counting)
    config = make_config(tiny_model, max_steps=3, eval_slices="[:2]", eval_steps=3)
    train(config)
    assert len(scored) == 3 + 2  # steps, and an evaluation before and after
    assert max(scored) <= 2 * 8  # two rows, and a few tokens of answer each


def test_accumulated_small_batches_give_the_losses_of_a_large_one(tiny_model: Path) -> None:
    options = {"sample_slices": "[:10]", "max_steps": 6}  # three steps an epoch, the last of two samples
    large = train(make_config(tiny_model, per_device_train_batch_size=4, **options))
    small = train(
        make_config(tiny_model, per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    )
    difference = differ(curve(small), curve(large))
    print(f"largest difference between batch 4 and 4 times batch 1: {difference:.2g}")
    assert difference < 1e-4
    assert len(curve(large)) == 6


def test_one_worker_left_of_three_trains_what_all_would(tiny_model: Path) -> None:
    options = {"sample_slices": "[:10]", "max_steps": 5}  # four steps an epoch, the last of a sample
    config = make_config(tiny_model, per_device_train_batch_size=1, **options)
    data = open_data(config)
    run = TrainingRun.of(config, data, num_workers=3)
    left = train_loop_per_worker({"run": run, "data": data})
    alone = train(make_config(tiny_model, per_device_train_batch_size=3, **options))
    assert differ(curve(left), curve(alone)) < 1e-4
    assert left.num_trained_here == alone.num_trained_here == 13


def test_mixed_precision_works_on_a_cpu(tiny_model: Path) -> None:
    full = curve(train(make_config(tiny_model, max_steps=4)))
    mixed = curve(train(make_config(tiny_model, max_steps=4, bf16=True)))
    assert mixed != full  # or it was not used
    assert mixed == pytest.approx(full, rel=0.01)  # bfloat16 has 8 bits


def test_gradient_checkpointing_changes_no_loss(tiny_model: Path) -> None:
    plain = train(make_config(tiny_model, max_steps=4, gradient_checkpointing=False))
    saving = train(make_config(tiny_model, max_steps=4, gradient_checkpointing=True))
    assert differ(curve(saving), curve(plain)) < 1e-5


def test_a_step_trains_exactly_the_planned_samples(tiny_model: Path, base: Any, processor: Any) -> None:
    config = make_config(tiny_model, sample_slices="[:5]", max_steps=6, learning_rate=0)
    data = open_data(config)
    plan = TrainingRun.of(config, data).plan("train", 1)
    batches = [[at for at in plan.batch(0, step) if at is not None] for step in range(6)]
    assert sorted(at for batch in batches[:3] for at in batch) == [0, 1, 2, 3, 4]
    expected = [mean_loss(base, processor, read_features(data.train, batch)) for batch in batches]
    assert differ(curve(train(config, data=data)), expected) < 1e-4


def test_a_few_dozen_steps_teach_a_family_of_questions(tiny_model: Path) -> None:
    config = make_config(
        tiny_model, dataset_name="charts?num_rows=64&family=count&kind=bar", max_steps=24, learning_rate=5e-3,
        per_device_train_batch_size=4,
    )  # fmt: skip
    losses = curve(train(config))
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    assert sum(losses[-3:]) / 3 < 0.25 * losses[0]


def test_bad_samples_are_named_and_the_others_trained(
    tiny_model: Path, base: Any, processor: Any, tmp_path: Path
) -> None:
    config = make_config(
        tiny_model, sample_slices="[:8]", max_steps=8, learning_rate=0, max_length=150, save_steps=2
    )
    plan = TrainingRun.of(config, open_data(config)).plan("train", 1)
    batches = [[at for at in plan.batch(0, step) if at is not None] for step in range(8)]
    # The first sample is bad, one step as a whole, and one sample of another.
    bad = {batches[0][0]: "special token", batches[1][0]: "empty answer", batches[1][1]: "broken image"}
    bad[batches[2][0]] = "too long"
    outcome = train(config, tmp_path, spoil(config, bad))
    assert {name: int(name[-6:]) for name in outcome.errors} == {f"train-{i:06d}": i for i in sorted(bad)}
    for index, reason in bad.items():
        told = {"broken image": "cannot identify image", "too long": "--max_length"}.get(reason, reason)
        assert told in outcome.errors[f"train-{index:06d}"]
    good = [[at for at in batch if at not in bad] for batch in batches]
    losses = curve(outcome)
    for loss, batch in zip(losses, good, strict=True):
        expected = mean_loss(base, processor, read_features(open_data(config).train, batch)) if batch else 0
        assert loss == pytest.approx(expected, abs=1e-4)
    assert losses[1] == 0
    asked = json.loads((tmp_path / "answers.json").read_text())
    assert [row["sample_id"] for row in asked] == [f"train-{at:06d}" for batch in good[:4] for at in batch]


def test_training_goes_on_after_a_step_of_bad_samples_alone(tiny_model: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model, sample_slices="[:8]", max_steps=6, save_steps=3, weight_decay=0.1)
    plan = TrainingRun.of(config, open_data(config)).plan("train", 1)
    data = spoil(config, dict.fromkeys((at for at in plan.batch(0, 1) if at is not None), "broken image"))
    with pytest.raises(Interruption):
        train(config, tmp_path, data, interrupted_at(4))
    outcome = train(config, tmp_path, data)
    assert len(outcome.errors) == 2  # found before the interruption, and in no later step
    losses = curve(outcome)
    assert all(map(math.isfinite, losses))
    assert losses[1] == 0
    assert losses[5] != losses[1]
    assert losses[5] < losses[0]
    assert all(bool(weight.isfinite().all()) for weight in
               load_file(tmp_path / "adapter_model.safetensors").values())  # fmt: skip


@pytest.mark.parametrize(("num_rows", "at_first"), [(4, 32), (20, 6)])
def test_a_run_that_learns_nothing_ends(
    tiny_model: Path, num_rows: int, at_first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_FAILED_AT_FIRST", at_first)
    config = make_config(tiny_model, sample_slices=f"[:{num_rows}]", max_steps=num_rows // 2)
    data = spoil(config, dict.fromkeys(range(num_rows), "empty answer"))
    expected = min(num_rows, at_first)
    with pytest.raises(
        NothingLearnedError,
        match=rf"^none of the first {expected} samples can be trained on; train-.*: empty",
    ):
        train(config, data=data)


@pytest.mark.parametrize("logging_steps", [1, 5])
def test_more_failures_than_max_errors_stop_the_run(
    tiny_model: Path, tmp_path: Path, logging_steps: int
) -> None:
    config = make_config(tiny_model, sample_slices="[:8]", max_steps=4, logging_steps=logging_steps)
    data = spoil(config, {1: "empty answer", 4: "broken image", 6: "empty answer"})
    stopped = train(dataclasses.replace(config, max_errors=2), tmp_path, data)
    assert stopped.too_many_errors == 3
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == stopped.num_steps
    again = train(dataclasses.replace(config, max_errors=2), tmp_path, data)
    assert again.too_many_errors == 3
    allowed = train(dataclasses.replace(config, max_errors=3), tmp_path, data)
    assert (allowed.too_many_errors, allowed.num_steps) == (None, 4)


def test_a_sample_that_fails_in_every_epoch_is_one_error(tiny_model: Path) -> None:
    config = make_config(tiny_model, sample_slices="[:4]", max_steps=6, max_errors=1)
    outcome = train(config, data=spoil(config, {2: "broken image"}))
    assert (outcome.too_many_errors, outcome.num_steps, len(outcome.errors)) == (None, 6, 1)


def train_session(config: Any, tmp_path: Path) -> tuple[WorkerSession, Outcome]:
    data = open_data(config)
    run = TrainingRun.of(config, data)
    session = WorkerSession(run, LocalWorker(run, data), tmp_path)
    return session, session.train()


def test_lora_leaves_the_base_as_it_was(tiny_model: Path, tmp_path: Path) -> None:
    session, outcome = train_session(
        make_config(tiny_model, max_steps=2, lora_vision=True, lora_merger=True), tmp_path
    )
    before = AutoModelForImageTextToText.from_pretrained(tiny_model).state_dict()
    after = {
        name.replace(".base_layer", ""): w
        for name, w in session.trainer.model.get_base_model().state_dict().items()
    }
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    adapter = {name: w for name, w in after.items() if "lora_" in name}
    assert sum(w.numel() for w in adapter.values()) == outcome.num_trainable
    assert any(".visual.blocks." in name for name in adapter)
    assert any(".visual.merger." in name for name in adapter)
    assert all(bool(w.any()) for name, w in adapter.items() if "lora_B" in name)  # all were trained
    assert len(adapter) == 2 * len(outcome.targets)


@pytest.mark.parametrize("freeze_vision", [False, True])
def test_full_fine_tuning_trains_all_but_what_is_frozen(
    tiny_model: Path, tmp_path: Path, freeze_vision: bool
) -> None:
    config = make_config(tiny_model, max_steps=2, use_peft=False, freeze_vision=freeze_vision)
    outcome = train(config, tmp_path)
    before = AutoModelForImageTextToText.from_pretrained(tiny_model).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    tower = {name for name in before if ".visual." in name and ".merger." not in name}
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == (tower if freeze_vision else set())
    frozen = sum(before[name].numel() for name in same)
    assert outcome.num_trainable == outcome.num_parameters - frozen
    assert outcome.targets == []


def test_progress_is_told(tiny_model: Path) -> None:
    told: list[dict[str, Any]] = []

    class Worker(LocalWorker):
        tell: Callable[..., None] = lambda self, **progress: told.append(progress)

    config = make_config(tiny_model, max_steps=2, eval_slices="[60:]", eval_steps=1)
    outcome = train(config, worker_type=Worker)
    assert told[0] == {"step": 0, "num_steps": 2, "started": True}
    assert [progress["step"] for progress in told if "step" in progress] == [0, 1, 2]
    assert [p["loss"] for p in told if "loss" in p] == curve(outcome)
    assert [p["eval_loss"] for p in told if "eval_loss" in p] == curve(outcome, "eval_loss")


@pytest.mark.parametrize("saved_first", [False, True])
def test_training_ends_where_it_diverges(tiny_model: Path, tmp_path: Path, saved_first: bool) -> None:
    """Neither a loss nor weights that are no numbers are gone on with, or kept."""
    options = {"save_steps": 2, "logging_steps": 5} if saved_first else {"save_steps": 50, "logging_steps": 1}
    config = make_config(tiny_model, max_steps=6, learning_rate=1e20, warmup_ratio=0, **options)
    told = "is not finite at step 2" if saved_first else r"(loss|grad_norm) is (nan|inf) at step [23]"
    with pytest.raises(DivergedError, match=f"{told}, so training has diverged; lower --learning_rate"):
        train(config, tmp_path)
    assert not list(tmp_path.iterdir())
