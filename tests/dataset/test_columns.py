"""Which columns mean what, and what is said where that cannot be told."""

from __future__ import annotations

import dataclasses

import pytest

from vlmray.dataset.columns import get_dataset_columns
from vlmray.dataset.registry import DATASETS

CHARTQA_COLUMNS = ("image", "query", "label", "human_or_machine")


@pytest.mark.parametrize("name", ["/data/chartqa", "./copy", "someone/chartqa-copy", "s3://bucket/x.parquet"])
def test_a_copy_of_chartqa_is_chartqa(name: str) -> None:
    assert get_dataset_columns(name, ["id", *CHARTQA_COLUMNS]) == DATASETS["HuggingFaceM4/ChartQA"]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["question"], ("question", None, None)),
        (["id", "image", "question", "answer"], ("question", "image", "answer")),
        (["img", "query", "label"], ("query", "img", "label")),
        (["image_url", "problem", "solution"], ("problem", "image_url", "solution")),
        (["images", "prompt", "response"], ("prompt", "images", "response")),
        (["text", "question", "answer", "answers"], ("question", None, "answers")),
    ],
)
def test_usual_columns_are_guessed(columns: list[str], expected: tuple[str | None, ...]) -> None:
    spec = get_dataset_columns("my/data", columns)
    assert (spec.question_column, spec.image_column, spec.answer_column) == expected
    assert (spec.metric, spec.prompt_template) == ("exact_match", "{question}")


def test_options_win_over_everything() -> None:
    columns = ["image", "query", "label", "human_or_machine", "q2", "kind"]
    spec = get_dataset_columns(
        "HuggingFaceM4/ChartQA", columns, question_column="q2", family_column="kind", metric="anls",
        prompt_template="{question}!", answer_column=None,
    )  # fmt: skip
    assert spec == dataclasses.replace(
        DATASETS["HuggingFaceM4/ChartQA"],
        question_column="q2",
        family_column="kind",
        metric="anls",
        prompt_template="{question}!",
    )
    assert get_dataset_columns("my/data", ["frage", "bild"], question_column="frage").image_column is None


@pytest.mark.parametrize(
    ("name", "columns", "options", "message"),
    [
        ("my/data", ["frage"], {}, "--question_column is needed: none of the columns frage looks like one"),
        (
            "my/data",
            ["question", "x"],
            {"image_column": "bild"},
            "--image_column: my/data has no column 'bild'; it has question, x",
        ),
        (
            "HuggingFaceM4/ChartQA",
            ["image", "query"],
            {},
            "--answer_column: HuggingFaceM4/ChartQA has no column 'label'; it has image, query",
        ),
        ("my/data", ["question"], {"question_column": "q"}, "--question_column: my/data has no column 'q'"),
    ],
)
def test_missing_columns(name: str, columns: list[str], options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match="column") as error_info:
        get_dataset_columns(name, columns, **options)
    assert message in str(error_info.value)
