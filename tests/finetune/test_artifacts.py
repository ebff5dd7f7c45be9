"""What a run leaves loads elsewhere and answers as the trained model did; what does not is found out."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from helpers.finetuning import curve, make_config, open_data, read_features, train
from vlmray.config import FinetuneConfig
from vlmray.engines import build_engine
from vlmray.finetune.artifacts import training_record, write_artifacts
from vlmray.finetune.results import Check
from vlmray.models.loading import generate_text_from_sample
from vlmray.models.processors import load_processor
from vlmray.storage.run_folder import RunFolder
from vlmray.training.run import TrainingRun
from vlmray.training.samples import first_question
from vlmray.training.worker import Outcome

pytestmark = pytest.mark.usefixtures("spare_time")

SAME, CHANGED, LOADS = "answers as the trained model did", "changes the base's logits", "loads afresh"
MERGED_SAME, MERGED_CHANGED = (
    "merged model answers as base and adapter do",
    "merged model changes the base's logits",
)


@dataclasses.dataclass
class Trained:
    """A finished run and what was written of it."""

    config: FinetuneConfig
    outcome: Outcome
    checkpoint: Path
    folder: Path
    checks: dict[str, Check]

    @property
    def requests(self) -> list[Any]:
        features = {feature["sample_id"]: feature for feature in read_features(open_data(self.config).train)}
        return [first_question(features[row["sample_id"]], 6) for row in self.answers]

    @property
    def answers(self) -> list[dict[str, Any]]:
        return json.loads((self.checkpoint / "answers.json").read_text())

    @property
    def texts(self) -> list[str]:
        """What the model answered while it was trained."""
        return [row["prediction"] for row in self.answers]


def write(config: FinetuneConfig, outcome: Outcome, checkpoint: Path, folder: Path) -> dict[str, Check]:
    run = TrainingRun.of(config, open_data(config))
    checks = write_artifacts(run, outcome, checkpoint, RunFolder.create(str(folder)))
    return {check.name: check for check in checks}


def train_and_write(folder: Path, config: FinetuneConfig) -> Trained:
    outcome = train(config, folder / "checkpoint")
    checks = write(config, outcome, folder / "checkpoint", folder / "out")
    return Trained(config, outcome, folder / "checkpoint", folder / "out", checks)


def answer(requests: list[Any], **options: Any) -> list[str]:
    engine = build_engine(engine="transformers", dtype="float32", **options)
    texts = [completion.text for completion in engine.generate(requests)]
    engine.close()
    return texts


def answer_plainly(model: Any, processor: Any, requests: list[Any]) -> list[str]:
    """Answer one by one, without an engine."""
    return [generate_text_from_sample(model.eval(), processor, request, 6)[0] for request in requests]


def learn(model: Path, **options: Any) -> FinetuneConfig:
    """Options under which a few steps change most answers."""
    return make_config(model, **{"max_steps": 6, "learning_rate": 5e-3, **options})


@pytest.fixture(scope="module")
def adapted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_and_write(tmp_path_factory.mktemp("adapted"), learn(tiny_model, merge_adapter=True))


@pytest.fixture(scope="module")
def tuned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    config = learn(tiny_model, use_peft=False, learning_rate=1e-3)
    return train_and_write(tmp_path_factory.mktemp("tuned"), config)


def test_an_adapter_folder_holds_what_others_load_and_no_more(adapted: Trained, tiny_model: Path) -> None:
    found = {path.name for path in (adapted.folder / "adapter").iterdir()}
    beside = {path.name for path in tiny_model.iterdir()} - {"config.json", "model.safetensors"}
    assert found == beside | {"adapter_config.json", "adapter_model.safetensors", "training.json"}
    config = json.loads((adapted.folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    limits = json.loads((adapted.folder / "adapter" / "preprocessor_config.json").read_text())
    assert limits["size"]["longest_edge"] == adapted.config.max_pixels


def test_every_check_of_a_good_run_passes(adapted: Trained, tuned: Trained) -> None:
    assert list(adapted.checks) == [LOADS, CHANGED, SAME, MERGED_CHANGED, MERGED_SAME]
    assert list(tuned.checks) == [LOADS, CHANGED, SAME]
    for trained in (adapted, tuned):
        assert [check for check in trained.checks.values() if not check.passed] == []
        assert "8 of 8 answers equal" in trained.checks[SAME].detail


def test_the_record_says_what_was_trained(adapted: Trained) -> None:
    record = json.loads((adapted.folder / "adapter" / "training.json").read_text())
    assert record["history"] == adapted.outcome.history
    assert record["options"]["learning_rate"] == 5e-3
    assert record["num_samples"] == 64
    assert len(record["model_fingerprint"]) > 10
    assert {check["name"] for check in record["checks"]} == set(adapted.checks)
    counts = [int(line.rpartition("(")[2][:-2]) for line in record["targets"]]
    assert sum(counts) == len(adapted.outcome.targets)


def test_the_adapter_answers_alike_in_plain_peft_and_in_the_engine(
    adapted: Trained, tiny_model: Path
) -> None:
    from peft import PeftModel

    adapter, requests, texts = adapted.folder / "adapter", adapted.requests, adapted.texts
    base = AutoModelForImageTextToText.from_pretrained(tiny_model).eval()
    processor = load_processor(str(tiny_model))
    # Tokenizer, template and image sizes come from the adapter's folder.
    processor.tokenizer = AutoTokenizer.from_pretrained(adapter)
    processor.chat_template = processor.tokenizer.chat_template
    processor.image_processor = AutoImageProcessor.from_pretrained(adapter, backend="pil")
    before = answer_plainly(base, processor, requests)
    assert sum(a != b for a, b in zip(before, texts, strict=True)) > 4  # equality says something
    assert answer_plainly(PeftModel.from_pretrained(base, adapter), processor, requests) == texts
    options = {"model_id": str(tiny_model), "adapter": str(adapter), "max_pixels": adapted.config.max_pixels}
    assert answer(requests, **options) == texts


def test_the_merged_model_needs_neither_base_nor_adapter(adapted: Trained) -> None:
    merged = adapted.folder / "merged"
    assert answer(adapted.requests, model_id=str(merged)) == adapted.texts
    model = AutoModelForImageTextToText.from_pretrained(merged)
    assert answer_plainly(model, load_processor(str(merged)), adapted.requests) == adapted.texts


def test_a_fully_trained_model_loads_as_any_other(tuned: Trained, tiny_model: Path) -> None:
    folder = tuned.folder / "model"
    assert {path.name for path in folder.iterdir()} == {p.name for p in tiny_model.iterdir()} | {
        "training.json"
    }
    assert answer(tuned.requests, model_id=str(folder)) == tuned.texts
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert answer_plainly(model, load_processor(str(folder)), tuned.requests) == tuned.texts
    assert answer(tuned.requests, model_id=str(tiny_model), max_pixels=tuned.config.max_pixels) != tuned.texts


def zeros(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(weight) for name, weight in weights.items()}


def others(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn_like(weight) / weight.shape[1] ** 0.5 for name, weight in weights.items()}


def one_missing(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(list(weights.items())[1:])


def none_a_number(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(weight, math.nan) for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("tamper", "failing"),
    [
        (zeros, {CHANGED, SAME}),
        (others, {SAME}),
        (one_missing, {LOADS}),
        (none_a_number, {LOADS}),
    ],
)
def test_a_tampered_adapter_fails_the_check_that_is_about_it(
    adapted: Trained, tmp_path: Path, tamper: Callable[[Any], dict[str, torch.Tensor]], failing: set[str]
) -> None:
    shutil.copytree(adapted.checkpoint, tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "adapter_model.safetensors"
    save_file(tamper(load_file(file)), file)
    config = dataclasses.replace(adapted.config, merge_adapter=False)
    checks = write(config, adapted.outcome, tmp_path / "checkpoint", tmp_path / "out")
    assert {name for name, check in checks.items() if not check.passed} == failing
    record = json.loads((tmp_path / "out" / "adapter" / "training.json").read_text())
    assert {check["name"] for check in record["checks"] if not check["passed"]} == failing


def test_an_adapter_for_quantized_weights_is_learned_and_passes(tiny_model: Path, tmp_path: Path) -> None:
    config = learn(tiny_model, quantization="4bit", sample_slices="[:4]", max_steps=8, merge_adapter=True)
    trained = train_and_write(tmp_path, config)
    losses = curve(trained.outcome)
    assert all(map(math.isfinite, losses))
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])
    assert [check for check in trained.checks.values() if not check.passed] == []


def test_a_merged_model_that_is_stored_rounded_may_turn_a_near_tie(tiny_model: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    AutoModelForImageTextToText.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(base)
    trained = train_and_write(tmp_path, learn(base, merge_adapter=True, seed=2, max_new_tokens=12))
    stored = load_file(trained.folder / "merged" / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    assert [check for check in trained.checks.values() if not check.passed] == []


def test_a_record_of_losses_that_are_no_numbers_is_json(adapted: Trained, tmp_path: Path) -> None:
    """An evaluation set of which no sample could be used has no loss."""
    config = dataclasses.replace(adapted.config, merge_adapter=False)
    history = [{**entry, "eval_loss": math.nan} for entry in adapted.outcome.history]
    outcome = dataclasses.replace(adapted.outcome, history=history)
    write(config, outcome, adapted.checkpoint, tmp_path / "out")
    text = (tmp_path / "out" / "adapter" / "training.json").read_text()
    record = json.loads(text, parse_constant=pytest.fail)  # NaN is no JSON
    assert [entry["eval_loss"] for entry in record["history"]] == ["nan"] * len(history)
    run = TrainingRun.of(config, open_data(config))
    RunFolder.create(str(tmp_path / "run")).finish(training_record(run, outcome, ()), "report")


def test_writing_again_replaces_what_was_there(adapted: Trained, tmp_path: Path) -> None:
    config = dataclasses.replace(adapted.config, merge_adapter=False)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "left.txt").touch()
    write(config, adapted.outcome, adapted.checkpoint, tmp_path)
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {
        p.name for p in (adapted.folder / "adapter").iterdir()
    }
