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
from vlmray import metrics
from vlmray.engines import build_engine
from vlmray.models.lora import get_default_lora_config_for_qwen_vl
from vlmray.models.processors import load_processor
from vlmray.training.arguments import parse_sft_config
from vlmray.training.run import TrainingRun
from vlmray.training.samples import first_question
from vlmray.training.worker import LocalWorker, Outcome, TrainingMistake, WorkerSession

pytestmark = pytest.mark.usefixtures("spare_time")

PIXELS = 4 * 28 * 28


def differ(found: list[float], expected: list[float]) -> float:
    """The largest difference of two curves."""
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    return load_processor(str(tiny_model), max_pixels=PIXELS)


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(tiny_model).eval()


# ---------------------------------------------------------------------------------------------
# The loss is TRL's, however a step is divided
# ---------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------
# A run that was interrupted
# ---------------------------------------------------------------------------------------------


class Interruption(RuntimeError):
    """Stands for a worker that dies."""


def interrupted_at(step: int) -> type[LocalWorker]:
    class Worker(LocalWorker):
        def tell(self, **progress: Any) -> None:
            if progress.get("step") == step:
                raise Interruption

    return Worker


TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
TIMES += ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
TIMES += ("num_tokens", "eval_num_tokens")  # since the process started


def logged(outcome: Outcome) -> list[dict[str, Any]]:
    """The history without the summary at the end and without times."""
    entries = [entry for entry in outcome.history if "train_runtime" not in entry]
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in entries]


def assert_same_history(found: Outcome, expected: Outcome) -> None:
    pairs = list(zip(logged(found), logged(expected), strict=True))
    for one, other in pairs:
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], abs=1e-5), (name, one["step"])
    print(f"largest difference after a resume: {differ(curve(found), curve(expected)):.2g}")


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


# ---------------------------------------------------------------------------------------------
# Samples that cannot be trained on
# ---------------------------------------------------------------------------------------------

BAD = {
    "empty answer": {"answers": [""]},
    "broken image": {"image": b"no picture"},
    "too long": {"question": "How many bars are there? " * 40},
    "special token": {"question": "What is <|image_pad|>?"},
}


def spoil(config: Any, bad: dict[int, str]) -> Any:
    return open_data(config, {index: BAD[reason] for index, reason in bad.items()})


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


# ---------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------


def answer_all(tiny_model: Path, features: list[dict[str, Any]], adapter: Path | None = None) -> list[str]:
    engine = build_engine(
        engine="transformers", model_id=str(tiny_model), max_pixels=PIXELS, dtype="float32",
        adapter=None if adapter is None else str(adapter),
    )  # fmt: skip
    texts = [completion.text for completion in engine.generate([first_question(f, 6) for f in features])]
    engine.close()
    return texts


@pytest.fixture(scope="module")
def eval_runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Any, Any, Path]]:
    """By evaluation batch size: data, outcome and checkpoint of otherwise equal runs.

    The base answers the first two evaluation samples rightly: what it says is the accepted answer.
    """
    runs = {}
    for batch_size in (1, 5):
        config = make_config(
            tiny_model, max_steps=3, eval_split="validation", eval_slices="[:7]", eval_steps=100,
            eval_samples=6, per_device_eval_batch_size=batch_size, learning_rate=5e-3, metric="exact_match",
        )  # fmt: skip
        asked = open_data(config).evaluation
        assert asked is not None
        said = answer_all(tiny_model, read_features(asked))
        assert len(set(said)) > 2
        data = open_data(config, eval_rows={index: {"answers": [said[index]]} for index in (0, 1)})
        folder = tmp_path_factory.mktemp("eval") / "checkpoint"
        runs[batch_size] = (data, train(config, folder, data), folder)
    return runs


def test_the_evaluation_does_not_depend_on_its_batch_size(eval_runs: dict[int, Any]) -> None:
    one, five = eval_runs[1][1], eval_runs[5][1]
    difference = differ(curve(one, "eval_loss"), curve(five, "eval_loss"))
    print(f"largest difference between evaluation batches of 1 and 5: {difference:.2g}")
    assert difference < 1e-5
    assert curve(one, "eval_exact_match") == curve(five, "eval_exact_match")
    assert one.answered == five.answered
    assert differ(curve(one), curve(five)) < 1e-6  # nor does training depend on evaluations


def test_the_first_evaluation_is_the_base_and_the_last_the_trained_model(
    eval_runs: dict[int, Any], tiny_model: Path, processor: Any
) -> None:
    from peft import PeftModel

    data, outcome, folder = eval_runs[5]
    features = read_features(data.evaluation)
    base = AutoModelForImageTextToText.from_pretrained(tiny_model).eval()
    losses = [mean_loss(base, processor, features)]
    losses.append(mean_loss(PeftModel.from_pretrained(base, folder).eval(), processor, features))
    difference = differ(curve(outcome, "eval_loss"), losses)
    print(f"largest difference from the loss by hand: {difference:.2g}")
    assert difference < 1e-4
    assert abs(losses[1] - losses[0]) > 0.1
    expected = []
    for adapter in (None, folder):
        texts = answer_all(tiny_model, features[:6], adapter)
        scores = [metrics.score("exact_match", text, feature["answers"]).value
                  for text, feature in zip(texts, features, strict=False)]  # fmt: skip
        expected.append(sum(scores) / 6)
    assert curve(outcome, "eval_exact_match") == pytest.approx(expected)
    assert expected[0] == pytest.approx(2 / 6)
    assert [row["prediction"] for row in outcome.answered] == texts
    assert [row["sample_id"] for row in outcome.answered] == [f["sample_id"] for f in features[:6]]


def test_without_answered_samples_the_loss_alone_is_evaluated(tiny_model: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model, max_steps=1, eval_slices="[60:]", eval_samples=0)
    outcome = train(config, tmp_path)
    assert len(curve(outcome, "eval_loss")) == 2
    assert not any("relaxed_accuracy" in name for entry in outcome.history for name in entry)
    assert outcome.answered == []


def test_an_evaluation_without_a_usable_sample_has_no_score(tiny_model: Path) -> None:
    config = make_config(tiny_model, max_steps=2, eval_split="validation", eval_slices="[:2]", eval_samples=2,
                         eval_steps=1)  # fmt: skip
    outcome = train(config, data=open_data(config, eval_rows=dict.fromkeys((0, 1), BAD["broken image"])))
    assert [len(curve(outcome)), len(outcome.eval_errors)] == [2, 2]
    assert all(map(math.isnan, curve(outcome, "eval_loss")))  # 0 would be the best of all losses
    assert all(map(math.isnan, curve(outcome, "eval_relaxed_accuracy")))


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


# ---------------------------------------------------------------------------------------------
# What is trained
# ---------------------------------------------------------------------------------------------


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


def test_a_fully_trained_run_resumes(tiny_model: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model, max_steps=3, use_peft=False, save_steps=1)
    expected = train(config, tmp_path / "whole")
    with pytest.raises(Interruption):
        train(config, tmp_path / "parts", worker_type=interrupted_at(2))
    assert_same_history(train(config, tmp_path / "parts"), expected)
    weights, others = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.allclose(weights[name], others[name], atol=1e-6) for name in weights)


def test_several_questions_on_one_image_are_all_answered(tiny_model: Path, tmp_path: Path) -> None:
    config = make_config(
        tiny_model, dataset_name="charts?num_rows=12&questions_per_image=3", max_turns=3, max_steps=8
    )
    data = open_data(config)
    run = TrainingRun.of(config, data)
    assert run.num_samples == 4
    session = WorkerSession(run, LocalWorker(run, data), tmp_path)
    taught = []
    for feature in read_features(data.train):
        batch = session.collator([feature])
        labels = batch["labels"][0]
        taught.append(session.collator.processor.tokenizer.decode(labels[labels != -100]))
        assert len(feature["images"]) == 1
    answers = [row["answers"][0] for row in data.train.source.read(range(12))]
    assert taught == ["".join(answer + END for answer in answers[at : at + 3]) for at in (0, 3, 6, 9)]
    outcome = session.train()
    losses = curve(outcome)
    assert outcome.errors == {}
    assert sum(losses[-2:]) < sum(losses[:2])


# ---------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------


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
