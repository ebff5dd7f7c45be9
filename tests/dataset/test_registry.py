"""Datasets that are known by name, and what is registered beside them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from vlmray.dataset import columns as dataset_columns
from vlmray.dataset import registry
from vlmray.dataset.columns import get_dataset_columns
from vlmray.dataset.prompts import check_prompt_template, format_data
from vlmray.dataset.registry import DATASETS, DatasetSpec, register_dataset
from vlmray.dataset.samples import to_sample
from vlmray.metrics import METRICS


@pytest.mark.parametrize("name", DATASETS)
def test_registered_datasets_are_complete(name: str) -> None:
    spec = DATASETS[name]
    check_prompt_template(spec.prompt_template)
    assert spec.metric in METRICS
    hub_name, _, config = name.partition("#")
    columns = ["id", *spec.columns().values()]
    assert get_dataset_columns(hub_name, columns, dataset_config=config or None) == spec


def test_datasets_are_known_where_they_moved_to() -> None:
    moved = [name for name in DATASETS if name.startswith("lmms-lab-encoder/")]
    assert {name.replace("-encoder", "") for name in moved} == {n for n in DATASETS if n[:9] == "lmms-lab/"}
    assert all(DATASETS[name] is DATASETS[name.replace("-encoder", "")] for name in moved)


@pytest.mark.parametrize(
    ("name", "row", "asked", "answers"),
    [
        (
            "lmms-lab-encoder/VQAv2",
            {"question": "What?", "answers": [{"answer": "net", "answer_id": 1}], "answer_type": "other"},
            "What?\nAnswer the question using a single word or phrase.", ("net",),
        ),
        (
            "lmms-lab/POPE", {"question": "Is there a snowboard?", "answer": "yes", "category": "popular"},
            "Is there a snowboard?\nAnswer the question using a single word or phrase.", ("yes",),
        ),
        (
            "Lin-Chen/MMStar", {"question": "Which?\nOptions: A: x, B: y", "answer": "A", "category": "math"},
            "Which?\nOptions: A: x, B: y\nAnswer with the option's letter from the given choices directly",
            ("A",),
        ),
    ],
)  # fmt: skip
def test_rows_of_benchmarks_are_worded_as_lmms_eval_words_them(
    name: str, row: dict[str, Any], asked: str, answers: tuple[str, ...]
) -> None:
    sample = to_sample({"image": b"png", **row}, DATASETS[name], "test-000000")
    (message,) = format_data(sample, prompt_template=DATASETS[name].prompt_template)
    assert message["content"] == [{"type": "image"}, {"type": "text", "text": asked}]
    assert sample.answers == answers
    assert sample.family == (row.get("category") or row["answer_type"])


def test_rows_of_mmmu_show_their_images_in_place_and_are_asked_by_kind() -> None:
    spec = DATASETS["lmms-lab/MMMU"]
    row = {f"image_{number}": None for number in range(3, 8)} | {
        "image_1": b"1", "image_2": b"2", "question": "Which is like <image 1>?", "answer": "B",
        "options": "['<image 2>', 'none']", "question_type": "multiple-choice", "subfield": "Art",
    }  # fmt: skip
    sample = to_sample(row, spec, "x")
    (message,) = format_data(sample, prompt_template=spec.template_of(sample.choices))
    shown = [part.get("text", part["type"]) for part in message["content"]]
    assert shown == [
        "Which is like ", "image", "?\nA. ", "image",
        "\nB. none\n\nAnswer with the option's letter from the given choices directly.",
    ]  # fmt: skip
    assert (sample.images, sample.answers, sample.metric) == ((b"1", b"2"), ("B",), None)
    open_row = {**row, "question": "How many in <image 1>?", "options": "[]", "question_type": "open"}
    sample = to_sample({**open_row, "answer": "7"}, spec, "x")
    (message,) = format_data(sample, prompt_template=spec.template_of(sample.choices))
    asked = "?\n\nAnswer the question using a single word or phrase."
    assert message["content"][-1]["text"] == asked
    assert (sample.images, sample.answers, sample.metric) == ((b"1",), ("7",), "mmmu_open")
    columns = ["id", *row, "explanation"]
    chosen = get_dataset_columns("lmms-lab/MMMU", columns, metric="exact_match", prompt_template="{question}")
    assert (chosen.row_metrics, chosen.open_prompt_template) == (None, None)


def test_formulas_of_ocrbench_are_scored_as_such() -> None:
    spec = DATASETS["echo840/OCRBench"]
    row = {"image": b"1", "question": "Write it.", "answer": ["x^{2}"], "question_type": "formula"}
    names = [to_sample({**row, "dataset": name}, spec, "x").metric for name in ("HME100k", "TextVQA")]
    assert names == ["ocrbench_formula", None]


def test_a_configuration_of_its_own_wins() -> None:
    plain = get_dataset_columns("lmms-lab/DocVQA", ["image", "question", "answers", "question_types"])
    other = ["image", "question", "answers", "answer_type"]
    infographic = get_dataset_columns("lmms-lab/DocVQA", other, dataset_config="InfographicVQA")
    assert plain.family_column == "question_types"
    assert infographic.family_column == "answer_type"


@pytest.mark.parametrize("name", ["charts", "charts?num_rows=3&seed=1"])
def test_charts_with_parameters(name: str) -> None:
    columns = ["image", "image_id", "question", "answers", "family"]
    assert get_dataset_columns(name, columns) == DATASETS["charts"]


def test_register_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    known = dict(DATASETS)
    for module in (registry, dataset_columns):
        monkeypatch.setattr(module, "DATASETS", known)
    base = DatasetSpec(question_column="frage", image_column="bild", metric="anls")
    hard = dataclasses.replace(base, answer_column="antwort")
    register_dataset("my/data", base)
    register_dataset("my/data#hard", hard)
    columns = ["frage", "bild", "antwort"]
    assert get_dataset_columns("my/data", columns) == base
    assert get_dataset_columns("my/data", columns, dataset_config="easy") == base
    assert get_dataset_columns("my/data", columns, dataset_config="hard") == hard
