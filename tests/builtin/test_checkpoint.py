"""The built-in model reads charts, wherever and however it is loaded."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoTokenizer

from helpers.paths import ROOT
from vlmray.builtin.charts import ChartsSource
from vlmray.builtin.models import BUILTIN, BUILTIN_FOLDER, trained_charts
from vlmray.builtin.questions import FAMILIES
from vlmray.builtin.random_models import SPECIAL_TOKENS
from vlmray.config import FinetuneConfig
from vlmray.config.parsing import build_config
from vlmray.dataset.columns import get_dataset_columns
from vlmray.dataset.rows import read_rows
from vlmray.engines import build_engine
from vlmray.engines.base import Engine
from vlmray.images.decoding import decode_image
from vlmray.inference import stages
from vlmray.inference.stages import Task
from vlmray.models.loading import generate_text_from_sample
from vlmray.models.processors import load_processor
from vlmray.schema import GenerationRequest

RECIPE = yaml.safe_load((BUILTIN_FOLDER / "recipe.yaml").read_text())
TRAINED = trained_charts()
NUM_CHARTS = 40
TASK = Task(prompt_template="{question}", metric="exact_match", max_new_tokens=48)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """One question of every family about each of some charts that were not trained on."""
    charts = replace(
        TRAINED, num_rows=NUM_CHARTS * len(FAMILIES), questions_per_image=len(FAMILIES), seed=77, family=None
    )
    source = ChartsSource(charts.name, "test")
    spec = get_dataset_columns("charts", source.column_names)
    read = read_rows(source, spec, "test", range(len(source)))
    return stages.prepare_rows(read, TASK)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = build_engine(engine="transformers", model_id=BUILTIN, dtype="float32", batch_size=16)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def scores(rows: list[dict[str, Any]], engine: Engine) -> dict[str, float]:
    return score(rows, engine)


def score(rows: list[dict[str, Any]], engine: Engine) -> dict[str, float]:
    """Mean score by family; `trained` for all families of the recipe together."""
    answered = stages.generate_rows([dict(row) for row in rows], engine, TASK)
    values: dict[str, list[float]] = {}
    for row in answered:
        names = [row["family"], *(["trained"] if row["family"] in TRAINED.families else [])]
        for name in names:
            values.setdefault(name, []).append(stages.score_row(row, TASK)["score"])
    return {name: sum(found) / len(found) for name, found in values.items()}


def card() -> dict[str, float]:
    """Accuracy by family, as the model card has it."""
    text = (BUILTIN_FOLDER / "README.md").read_text()
    found = re.findall(r"^\| (\w+)(?: \(untrained\))? \| [\d,]+ \| ([\d.]+) \|$", text, flags=re.MULTILINE)
    return {family: float(accuracy) for family, accuracy in found}


def test_it_answers_as_its_card_says(scores: dict[str, float]) -> None:
    print({name: round(value, 2) for name, value in scores.items()})
    expected = card()
    assert expected.keys() == set(FAMILIES)
    for family, accuracy in expected.items():
        error = 3 * math.sqrt(accuracy * (1 - accuracy) / NUM_CHARTS) + 0.02
        assert abs(scores[family] - accuracy) <= error, family


def test_it_leaves_something_to_teach(scores: dict[str, float]) -> None:
    others = [family for family in FAMILIES if family not in TRAINED.families]
    assert len(others) >= 2
    assert max(scores[family] for family in others) <= 0.4


def test_answers_do_not_depend_on_the_batch_or_a_save(
    rows: list[dict[str, Any]], engine: Engine, tmp_path: Path
) -> None:
    requests = [
        replace(request, images=[decode_image(image) for image in request.images])
        for request in stages.make_requests(rows[:: len(rows) // 64], TASK)
    ]
    together = [completion.text for completion in engine.generate(requests)]
    processor = load_processor(str(BUILTIN_FOLDER))
    model: Any = AutoModelForImageTextToText.from_pretrained(BUILTIN_FOLDER, dtype=torch.float32)
    alone = [_answer(model, processor, request) for request in requests]
    model.save_pretrained(tmp_path)
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    assert together == alone == [_answer(saved, processor, request) for request in requests]
    assert len(set(alone)) > 15


def _answer(model: Any, processor: Any, request: GenerationRequest) -> str:
    return generate_text_from_sample(model.eval(), processor, request, TASK.max_new_tokens)[0]


def test_four_bits_cost_little(rows: list[dict[str, Any]], scores: dict[str, float]) -> None:
    trained = [row for row in rows if row["family"] in TRAINED.families]
    quantized = build_engine(engine="transformers", model_id=BUILTIN, quantization="4bit", batch_size=16)
    found = score(trained, quantized)
    quantized.close()
    print(f"trained families: {scores['trained']:.3f} in float32, {found['trained']:.3f} in 4 bits")
    assert found["trained"] >= scores["trained"] - 0.05


def test_the_folder_is_a_small_checkpoint_like_any_other() -> None:
    weights = BUILTIN_FOLDER / "model.safetensors"
    assert weights.stat().st_size <= 16_000_000
    assert not [path for path in BUILTIN_FOLDER.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".py")]
    tokenizer: Any = AutoTokenizer.from_pretrained(BUILTIN_FOLDER)
    assert all(len(tokenizer.encode(token)) == 1 for token in SPECIAL_TOKENS)
    assert "vlmray/builtin/checkpoint/recipe.yaml" in (BUILTIN_FOLDER / "README.md").read_text()


def test_the_recipe_is_one_that_the_job_takes() -> None:
    config = build_config(FinetuneConfig, RECIPE)
    assert not config.use_peft
    assert TRAINED.questions_per_image == config.max_turns  # every question about a chart is one sample


def test_the_wheel_brings_the_model(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path)]
    subprocess.run([*pip, str(ROOT)], check=True, timeout=240)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for path in BUILTIN_FOLDER.iterdir():
            assert archive.read(f"vlmray/builtin/checkpoint/{path.name}") == path.read_bytes()
