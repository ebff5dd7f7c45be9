"""Datasets: slices as Python cuts them, columns that are told or guessed, and rows of many shapes."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest

from vlmray.dataset import registry
from vlmray.dataset.prompts import check_prompt_template
from vlmray.dataset.registry import DATASETS, DatasetSpec, get_dataset_columns, register_dataset
from vlmray.dataset.samples import to_sample
from vlmray.dataset.slices import parse_sample_slices, sample_id
from vlmray.metrics import METRICS, score

CHARTQA_COLUMNS = ("image", "query", "label", "human_or_machine")


# --sample_slices


def _random_slice(rng: random.Random, num_rows: int) -> tuple[str, slice]:
    bounds = [rng.choice([None, rng.randint(-2 * num_rows, 2 * num_rows)]) for _ in range(2)]
    step = rng.choice([None, rng.choice([-7, -3, -2, -1, 1, 2, 3, 7])])
    texts = ["" if bound is None else str(bound) for bound in bounds]
    tail = rng.choice(["", ":"]) if step is None else f":{step}"
    return ":".join(texts) + tail, slice(*bounds, step)


def test_slices_are_pythons_own() -> None:
    rng = random.Random(0)
    for _ in range(5000):
        num_rows = rng.randint(1, 30)
        text, expected = _random_slice(rng, num_rows)
        rows = list(range(num_rows))[expected]
        for spelling in (text, f"[{text}]", f" [ {text.replace(':', ' : ')} ] "):
            if rows:
                assert parse_sample_slices(spelling, num_rows) == rows, spelling
            else:
                with pytest.raises(ValueError, match=f"selects nothing; the split has {num_rows} rows"):
                    parse_sample_slices(spelling, num_rows)


def test_several_slices_keep_their_order_and_each_row_once() -> None:
    rng = random.Random(1)
    for _ in range(1000):
        num_rows = rng.randint(1, 20)
        parts = [_random_slice(rng, num_rows) for _ in range(rng.randint(1, 4))]
        rows = [row for _, part in parts for row in range(num_rows)[part]]
        if rows:
            text = ",".join(rng.choice(["{}", "[{}]", " {} "]).format(part) for part, _ in parts)
            assert parse_sample_slices(text, num_rows) == list(dict.fromkeys(rows)), text


@pytest.mark.parametrize("index", range(-10, 10))
def test_single_indices(index: int) -> None:
    expected = [list(range(10))[index]]
    assert parse_sample_slices(str(index), 10) == expected
    assert parse_sample_slices(f"[{index}]", 10) == expected


@pytest.mark.parametrize("index", ["10", "-11", "999999999999999999"])
def test_an_index_out_of_range(index: str) -> None:
    with pytest.raises(ValueError, match=f"no row {index}; the split has 10 rows"):
        parse_sample_slices(f"[:2],{index}", 10)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ",", "[]", "[ ]", "[:],", ",[:]", "[:],,[:]", "all", "a:b", "1.5", "1e3", "+1", "--1", "-",
        "-:", ":-", "1:2:3:4", "::0", "::-0", "1::00", "[0:3", "0:3]", "[[0:3]]", "(0:3)", "[0:3][5]",
        "[0:3] [5]", "1 0", "0:1 0", "- 1", "[1,2]", "0-3", "0..3", "slice(3)", "٣", "1" * 5000,
        ":" + "9" * 19, "0:3;5",
    ],
)  # fmt: skip
def test_malformed_slices(text: str) -> None:
    with pytest.raises(ValueError, match="is not a list of Python slices; examples: '\\[0:100\\]'"):
        parse_sample_slices(text, 10)


def test_no_rows_at_all() -> None:
    with pytest.raises(ValueError, match="selects nothing; the split has 0 rows"):
        parse_sample_slices("[:]", 0)


def test_a_large_split_is_fast() -> None:
    assert len(parse_sample_slices("[:]", 1_000_000)) == 1_000_000


def test_sample_ids_sort_like_rows_and_are_unique() -> None:
    names = [sample_id("test", index) for index in range(0, 2000, 7)]
    assert names == sorted(set(names))
    assert sample_id("test", 42) == "test-000042"
    assert sample_id("test", 1_234_567) == "test-1234567"


# Columns


@pytest.mark.parametrize("name", DATASETS)
def test_registered_datasets_are_complete(name: str) -> None:
    spec = DATASETS[name]
    check_prompt_template(spec.prompt_template)
    assert spec.metric in METRICS
    hub_name, _, config = name.partition("#")
    columns = ["id", *spec.columns().values()]
    assert get_dataset_columns(hub_name, columns, dataset_config=config or None) == spec


def test_a_configuration_of_its_own_wins() -> None:
    plain = get_dataset_columns("lmms-lab/DocVQA", ["image", "question", "answers", "question_types"])
    other = ["image", "question", "answers", "answer_type"]
    infographic = get_dataset_columns("lmms-lab/DocVQA", other, dataset_config="InfographicVQA")
    assert plain.family_column == "question_types"
    assert infographic.family_column == "answer_type"


@pytest.mark.parametrize("name", ["/data/chartqa", "./copy", "someone/chartqa-copy", "s3://bucket/x.parquet"])
def test_a_copy_of_chartqa_is_chartqa(name: str) -> None:
    assert get_dataset_columns(name, ["id", *CHARTQA_COLUMNS]) == DATASETS["HuggingFaceM4/ChartQA"]


@pytest.mark.parametrize("name", ["charts", "charts?num_rows=3&seed=1"])
def test_charts_with_parameters(name: str) -> None:
    columns = ["image", "image_id", "question", "answers", "family"]
    assert get_dataset_columns(name, columns) == DATASETS["charts"]


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


def test_register_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "DATASETS", dict(DATASETS))
    base = DatasetSpec(question_column="frage", image_column="bild", metric="anls")
    hard = dataclasses.replace(base, answer_column="antwort")
    register_dataset("my/data", base)
    register_dataset("my/data#hard", hard)
    columns = ["frage", "bild", "antwort"]
    assert get_dataset_columns("my/data", columns) == base
    assert get_dataset_columns("my/data", columns, dataset_config="easy") == base
    assert get_dataset_columns("my/data", columns, dataset_config="hard") == hard


# Rows

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
        (True, ("True",)),
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
        (["a.png"], "a.png"),
        ([{"bytes": b"png", "path": None}], b"png"),
    ],
)
def test_shapes_of_images(image: Any, expected: bytes | str | None) -> None:
    optional = dataclasses.replace(SPEC, image_optional=True)
    assert to_sample(_row(image=image), optional, "test-000000").image == expected
    if expected is None:
        with pytest.raises(ValueError, match="no image in column"):
            to_sample(_row(image=image), SPEC, "test-000000")
    else:
        assert to_sample(_row(image=image), SPEC, "test-000000").image == expected


def test_several_images_are_an_error() -> None:
    with pytest.raises(ValueError, match="the row has 2 images; one a question is supported"):
        to_sample(_row(image=["a.png", "b.png"]), SPEC, "test-000000")


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
    assert (sample.answers, sample.image, sample.choices, sample.family) == ((), None, (), None)
