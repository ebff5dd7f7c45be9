"""Rows become samples: answers, choices, images and families in all their shapes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from vlmray.dataset.registry import DATASETS, DatasetSpec
from vlmray.dataset.samples import to_sample
from vlmray.metrics import score

SPEC = DatasetSpec(
    question_column="question", image_column="image", answer_column="answer", family_column="family"
)
CHOICES = dataclasses.replace(SPEC, choices_column="choices", metric="choice_accuracy")


def _row(**fields: Any) -> dict[str, Any]:
    return {"question": "Which?", "image": b"png", "answer": None, "family": None, "choices": None, **fields}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (None, ()),
        ("", ("",)),
        ("3", ("3",)),
        (3, ("3",)),
        (0, ("0",)),
        (2.5, ("2.5",)),
        (True, ("true",)),
        ([], ()),
        (["3", "three"], ("3", "three")),
        (("3", 3, None), ("3", "3")),
        ([["a"], ["b", ["c"]]], ("a", "b", "c")),
        ({"answer": "yes", "confidence": 1}, ("yes",)),
        ([{"answer": "yes"}, {"answer": "no"}, {"answer": None}], ("yes", "no")),
        ({"text": ["a", "b"], "answer_start": [0, 4]}, ("a", "b")),
        (np.array(["a", "b"]), ("a", "b")),
        (np.array([1, 2]), ("1", "2")),
        (np.float64(2.5), ("2.5",)),
        (np.array([], dtype=object), ()),
    ],
)
def test_shapes_of_answers(answer: Any, expected: tuple[str, ...]) -> None:
    sample = to_sample(_row(answer=answer), SPEC, "test-000000")
    assert sample.answers == expected
    assert all(type(text) is str for text in sample.answers)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (0, ("A",)),
        ("2", ("C",)),
        ("B", ("B",)),
        ("blue", ("B", "blue")),
        ("purple", ("purple",)),
        (["blue", "2"], ("B", "blue", "C")),
        (3, ("3",)),
        (-1, ("-1",)),
        ("²", ("²",)),
        ("D", ("D",)),
        ("", ("",)),
        (None, ()),
    ],
)
def test_answers_of_multiple_choice(answer: Any, expected: tuple[str, ...]) -> None:
    row = _row(answer=answer, choices=["red", "blue", "green"])
    sample = to_sample(row, CHOICES, "test-000000")
    assert sample.choices == ("red", "blue", "green")
    assert sample.answers == expected


@pytest.mark.parametrize("answer", [1, "1", "B", "blue"])
def test_a_letter_is_right_however_the_answer_is_kept(answer: Any) -> None:
    sample = to_sample(_row(answer=answer, choices=["red", "blue"]), CHOICES, "test-000000")
    assert score("choice_accuracy", "B", sample.answers).value == 1.0
    assert score("choice_accuracy", "A", sample.answers).value == 0.0


def test_more_choices_than_letters_are_left_to_the_prompt() -> None:
    sample = to_sample(_row(answer=30, choices=[str(n) for n in range(40)]), CHOICES, "test-000000")
    assert len(sample.choices) == 40
    assert sample.answers == ("30",)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (None, None),
        (b"png", b"png"),
        (b"", b""),
        ("chart.png", "chart.png"),
        ("https://example.org/a.png", "https://example.org/a.png"),
        ({"bytes": b"png", "path": "a.png"}, b"png"),
        ({"bytes": b"", "path": "a.png"}, b""),
        ({"bytes": None, "path": "a.png"}, "a.png"),
        ({"bytes": None, "path": None}, None),
        ([], None),
        ([None], None),
        (["a.png"], "a.png"),
        ([{"bytes": b"png", "path": None}], b"png"),
    ],
)
def test_shapes_of_images(image: Any, expected: bytes | str | None) -> None:
    optional = dataclasses.replace(SPEC, image_optional=True)
    images = () if expected is None else (expected,)
    assert to_sample(_row(image=image), optional, "test-000000").images == images
    if expected is None:
        with pytest.raises(ValueError, match="no image in column"):
            to_sample(_row(image=image), SPEC, "test-000000")
    else:
        assert to_sample(_row(image=image), SPEC, "test-000000").images == images


def test_several_images() -> None:
    one = {"bytes": None, "path": "a.png"}
    for value in (["a.png", b"b"], [one, None, b"b"], [[one], [{"bytes": b"b", "path": "x"}]]):
        assert to_sample(_row(image=value), SPEC, "test-000000").images == ("a.png", b"b")
    several = dataclasses.replace(SPEC, image_column="image, image_2,image_3")
    row = {**_row(image="a.png"), "image_2": None, "image_3": ["c.png", "d.png"]}
    assert to_sample(row, several, "test-000000").images == ("a.png", "c.png", "d.png")


def test_numbered_marks_choose_images() -> None:
    images = ["a", "b", "c"]
    sample = to_sample(_row(question="<image 3> or <image 1>, as <image 3>?", image=images), SPEC, "x")
    assert sample.images == ("c", "a", "c")
    row = _row(question="Which?", image=images, choices=["<image 2>", "<image 1>"], answer="B")
    assert to_sample(row, CHOICES, "x").images == ("b", "a")
    before = dataclasses.replace(CHOICES, prompt_template="{choices}\n{question}")
    row = {**row, "question": "Which is like <image 3>?"}
    assert to_sample(row, before, "x").images == ("b", "a", "c")
    with pytest.raises(ValueError, match="the text has '<image 4>', and the row has 3 images"):
        to_sample(_row(question="<image 4>", image=images), SPEC, "x")


@pytest.mark.parametrize(("question", "expected"), [(None, ""), ("", ""), (5, "5"), (" Why? ", " Why? ")])
def test_questions_are_text(question: Any, expected: str) -> None:
    assert to_sample(_row(question=question), SPEC, "test-000000").question == expected


@pytest.mark.parametrize(
    ("family", "expected"),
    [(None, None), ("human", "human"), (0, "human"), (1, "augmented"), ("machine", "augmented"), (7, "7"),
     (["table", "figure"], "table, figure")],
)  # fmt: skip
def test_families_have_names(family: Any, expected: str | None) -> None:
    spec = dataclasses.replace(SPEC, family_names=DATASETS["HuggingFaceM4/ChartQA"].family_names)
    assert to_sample(_row(family=family), spec, "test-000000").family == expected


def test_columns_that_are_not_in_use_are_not_read() -> None:
    sample = to_sample({"question": "Why?"}, DatasetSpec(question_column="question"), "train-000007")
    assert (sample.sample_id, sample.question) == ("train-000007", "Why?")
    assert (sample.answers, sample.images, sample.choices, sample.family) == ((), (), (), None)
