"""Questions: what the options choose is what is opened, and each mistake names its option."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from vlmray.config import FinetuneConfig, InferConfig, QuestionsConfig
from vlmray.dataset.registry import DATASETS
from vlmray.dataset.selection import open_selection
from vlmray.errors import OptionError
from vlmray.models.source import ModelSource


def _config(**options: Any) -> QuestionsConfig:
    return QuestionsConfig(**{"dataset_name": "charts?num_rows=20", "model_id": "tiny-random", **options})


def test_a_dataset_is_opened_as_registered() -> None:
    questions = open_selection(_config(system_prompt="Be brief."), "validation", "[-2:],0")
    assert questions.spec == DATASETS["charts"]
    assert list(questions.selected) == [18, 19, 0]
    assert (questions.split, questions.system_prompt) == ("validation", "Be brief.")
    assert len(questions.source) == 20


def test_options_win_over_the_registry() -> None:
    config = _config(
        question_column="image_id", answer_column="question", family_column="image_id", metric="anls",
        prompt_template="Q: {question}",
    )  # fmt: skip
    spec = open_selection(config, "train", "[:]").spec
    assert (spec.question_column, spec.answer_column, spec.family_column) == (
        "image_id",
        "question",
        "image_id",
    )
    assert (spec.metric, spec.prompt_template, spec.image_column) == ("anls", "Q: {question}", "image")


def test_both_jobs_open_the_same_questions() -> None:
    options: dict[str, Any] = {"dataset_name": "charts?num_rows=20&seed=4", "prompt_template": "{question}!"}
    asked = open_selection(InferConfig(sample_slices="[:5]", **options), "test", "[:5]")
    trained = open_selection(FinetuneConfig(**options), "test", "[:5]")
    assert asked.spec == trained.spec
    assert asked.source.read(asked.selected) == trained.source.read(trained.selected)


@pytest.mark.parametrize(
    ("options", "split", "slices", "message"),
    [
        (
            {"dataset_name": "charts?rows=3"},
            "test",
            "[:]",
            "--dataset_name: charts: unknown parameter 'rows'",
        ),
        ({}, "tset", "[:]", "--dataset_split: charts: unknown split 'tset'; known: train, validation, test"),
        ({"dataset_config": "hard"}, "test", "[:]", "--dataset_config 'hard'"),
        ({}, "test", "[20:]", "--sample_slices '[20:]' selects nothing; the split has 20 rows"),
        ({}, "test", "[20]", "--sample_slices '[20]': no row 20"),
        ({}, "test", "all", "--sample_slices 'all' is not a list of Python slices"),
        ({"metric": "acuracy"}, "test", "[:]", "--metric 'acuracy' is unknown; known: "),
        ({"prompt_template": "Hello"}, "test", "[:]", "--prompt_template: prompt template 'Hello' does not"),
        ({"prompt_template": "{question} {image}"}, "test", "[:]", "--prompt_template: prompt template"),
        *(
            (
                {f"{column}_column": "gone"},
                "test",
                "[:]",
                f"--{column}_column: charts?num_rows=20 has no column",
            )
            for column in ("question", "image", "answer", "family")
        ),
    ],
)
def test_mistakes_name_their_option(options: Any, split: str, slices: str, message: str) -> None:
    with pytest.raises(ValueError, match="--") as error_info:
        open_selection(_config(**options), split, slices)
    assert str(error_info.value).startswith(message)
    assert "\n" not in str(error_info.value)


@pytest.mark.parametrize("split", ["test[:10]", "test/0"])
def test_a_split_is_only_a_name(split: str) -> None:
    with pytest.raises(OptionError) as error_info:
        open_selection(_config(), split, "[:]")
    assert str(error_info.value) == (
        f"--dataset_split '{split}' is not a split name; rows are chosen by --sample_slices"
    )


@pytest.mark.parametrize(
    ("split", "slices", "message"),
    [
        ("tset", "[:]", "--eval_split: charts: unknown split 'tset'; known: train, validation, test"),
        ("test[:2]", "[:]", "--eval_split 'test[:2]' is not a split name; rows are chosen by --eval_slices"),
        ("test", "all", "--eval_slices 'all' is not a list of Python slices; examples: '[0:100]', '[:]', "),
        ("test", "[20:]", "--eval_slices '[20:]' selects nothing; the split has 20 rows"),
    ],
)
def test_mistakes_name_the_options_that_were_used(split: str, slices: str, message: str) -> None:
    with pytest.raises(OptionError) as error_info:
        open_selection(_config(), split, slices, split_option="eval_split", slices_option="eval_slices")
    assert str(error_info.value).startswith(message)


def test_an_option_is_not_guessed_from_words() -> None:
    with pytest.raises(OptionError) as error_info:
        open_selection(_config(dataset_name="charts?split=3"), "test", "[:]", split_option="eval_split")
    assert str(error_info.value).startswith("--dataset_name: charts: unknown parameter 'split'")


def test_models(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    ModelSource.open("tiny-random")
    shutil.copytree(tiny_model, tmp_path / "model")
    for name in ("config.json", "model.safetensors"):
        file = (tmp_path / "model" / name).rename(tmp_path / name)
        with pytest.raises(FileNotFoundError, match="in this folder"):
            ModelSource.open(str(tmp_path / "model"))
        file.rename(tmp_path / "model" / name)
    ModelSource.open(str(tmp_path / "model"))
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        ModelSource.open(str(tmp_path / "model"))
    for model_id in ("./gone", str(tmp_path / "gone")):
        with pytest.raises(FileNotFoundError, match=f"--model_id {model_id}: no such folder"):
            ModelSource.open(model_id)
    with pytest.raises(ValueError, match="--model_id 'owner/gone' is not here and the hub cannot be reached"):
        ModelSource.open("owner/gone")
