"""What is measured while a model is trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText

from helpers.finetuning import (
    END,
    curve,
    make_config,
    mean_loss,
    open_data,
    read_features,
    train,
)
from helpers.trainings import BAD, PIXELS, differ
from vlmray import metrics
from vlmray.engines import build_engine
from vlmray.models.processors import load_processor
from vlmray.training.run import TrainingRun
from vlmray.training.samples import first_question
from vlmray.training.worker import LocalWorker, WorkerSession

pytestmark = pytest.mark.usefixtures("spare_time")


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    return load_processor(str(tiny_model), max_pixels=PIXELS)


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
