"""What a dataset holds and is not understood is refused in one line, or said."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.datasets import png
from vlmray.config import BenchmarkConfig, FinetuneConfig, InferConfig, QuestionsConfig
from vlmray.dataset.columns import get_dataset_columns
from vlmray.dataset.images import image_kind
from vlmray.dataset.prompts import format_data
from vlmray.dataset.registry import DATASETS, LETTER_ANSWER, DatasetSpec
from vlmray.dataset.rows import read_rows
from vlmray.dataset.samples import to_sample
from vlmray.dataset.selection import Selection, describe_columns, open_selection
from vlmray.errors import OptionError

PNG = png(1)
BASE64 = base64.b64encode(PNG).decode()


def _open(path: Path, **options: Any) -> Selection:
    return open_selection(QuestionsConfig(dataset_name=str(path), **options), "test", "[:]")


def _mistake(path: Path, **options: Any) -> str:
    with pytest.raises(OptionError) as error_info:
        _open(path, **options)
    assert "\n" not in str(error_info.value)
    return str(error_info.value)


def _jsonl(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name in ("p.png", "q.png"):
        (folder / name).write_bytes(PNG)
    return path


def _parquet(folder: Path, **columns: Any) -> Path:
    path = folder / "rows.parquet"
    pq.write_table(pa.table(columns), path)
    return path


# Images that nobody would see


@pytest.mark.parametrize(
    "value",
    [
        "p.png", "sub/my photo.JPG", "https://example.org/a.jpeg?size=2", "https://example.org/photos/7",
        "file:///data/a.webp", f"data:image/png;base64,{BASE64}", BASE64, ["p.png"], {"path": "p.png"},
        {"bytes": None, "path": "a.gif"}, [{"bytes": BASE64, "path": None}], [None, "p.tiff"],
    ],
)  # fmt: skip
@pytest.mark.parametrize("rows_before", [0, 3])
def test_images_in_a_column_that_is_not_recognised(value: Any, rows_before: int, tmp_path: Path) -> None:
    rows = [{"photo": None, "question": "q?", "answer": "a"}] * rows_before
    path = _jsonl(tmp_path, *rows, {"photo": value, "question": "q?", "answer": "a"})
    assert _mistake(path) == (
        "--image_column is needed: column 'photo' holds images, and no column of a usual name does; "
        "pass --image_column photo, or --image_column none to ask without images"
    )
    assert _open(path, image_column="photo").spec.image_column == "photo"
    assert _open(path, image_column="none").spec.image_column is None


@pytest.mark.parametrize(
    "photo", [[PNG], [{"bytes": PNG, "path": "x"}], [[PNG]], [{"bytes": b"?", "path": None}]]
)
@pytest.mark.parametrize("as_uri", [False, True])
def test_typed_images_in_a_column_that_is_not_recognised(photo: Any, as_uri: bool, tmp_path: Path) -> None:
    path = _parquet(tmp_path, photo=photo, question=["q?"], answer=["a"])
    with pytest.raises(OptionError, match="--image_column is needed: column 'photo' holds images"):
        open_selection(QuestionsConfig(dataset_name=path.as_uri() if as_uri else str(path)), "test", "[:]")


@pytest.mark.parametrize(
    "value",
    [None, "a photo of a cat", "p", 5, "", "https://example.org/", ["a", "b"], {"name": "p.png"}, "a.txt"],
)
def test_other_columns_are_no_images(value: Any, tmp_path: Path) -> None:
    path = _jsonl(tmp_path, {"source": value, "question": "is it a.png", "answer": "b.png"})
    assert _open(path).spec.image_column is None


def test_bytes_are_images_if_they_decode() -> None:
    assert [image_kind(data) for data in (PNG, b"", b"\x00\x01", PNG[:4])] == ["data", None, None, None]


def test_every_job_refuses_images_that_it_would_not_see(tmp_path: Path) -> None:
    from vlmray.benchmark.plan import plan_benchmark
    from vlmray.finetune.plan import open_training_data
    from vlmray.inference.plan import plan_inference

    common = {"dataset_name": str(_jsonl(tmp_path, {"photo": "p.png", "question": "q?", "answer": "a"}))}
    fake = {**common, "engine": "fake", "sample_slices": "[:]", "output_dir": str(tmp_path / "out")}
    for open_job in (
        lambda: open_training_data(FinetuneConfig(**common, model_id="tiny-random")),
        lambda: plan_inference(InferConfig(**fake, model_id="fake")),
        lambda: plan_benchmark(BenchmarkConfig(**fake, models="a=tiny-random")),
    ):
        with pytest.raises(OptionError, match="--image_column is needed: column 'photo' holds images"):
            open_job()


# Several images


@pytest.mark.parametrize(
    ("columns", "named", "passed"),
    [
        ({"image": "p.png", "image2": "q.png"}, "columns 'image', 'image2'", "image"),
        ({"image_1": "p.png", "image_2": "q.png"}, "columns 'image_1', 'image_2'", "image_1"),
        ({"image_1": "p.png", "image_2": None}, "column 'image_1'", "image_1"),
        ({"image": "p.png", "second": "q.png"}, "columns 'image', 'second'", "image"),
        ({"before": "p.png", "after": "q.png"}, "columns 'before', 'after'", "before"),
    ],
)
def test_several_columns_of_images(columns: dict[str, Any], named: str, passed: str, tmp_path: Path) -> None:
    path = _jsonl(tmp_path, {**columns, "question": "q?", "answer": "a"})
    message = _mistake(path)
    assert message.startswith(f"--image_column is needed: {named} hold")
    assert f"pass --image_column {passed}" in message
    assert _open(path, image_column=passed).spec.image_column == passed
    selection = _open(path, image_column=",".join(columns))
    (row,) = read_rows(selection.source, selection.spec, "test", [0])
    assert row["images"] == [PNG for value in columns.values() if value]
    assert "not used" not in describe_columns(selection.source, selection.spec)


@pytest.mark.parametrize("other", ["p.png", "train/p.png", "https://example.org/p.png", None])
def test_one_image_named_twice_is_one(other: str | None, tmp_path: Path) -> None:
    path = _jsonl(tmp_path, {"image": "p.png", "file_name": other, "question": "q?", "answer": "a"})
    selection = _open(path)
    assert selection.spec.image_column == "image"
    assert "not used: file_name" in describe_columns(selection.source, selection.spec)


# Questions that are no texts, and marks in them


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ([{"from": "human", "text": "Why?"}], "a list of a structure of from, text"),
        (["Why?", "How?"], "a list"),
        ({"text": "Why?"}, "a structure of text"),
    ],
)
def test_questions_that_are_no_texts(value: Any, found: str, tmp_path: Path) -> None:
    path = _jsonl(tmp_path, {"image": "p.png", "conversations": value, "answer": "a"})
    assert _mistake(path, question_column="conversations") == (
        f"--question_column: 'conversations' holds {found}, and a question is a text; "
        'write a row for each question, or conversations of {"role", "content"} turns'
    )


def test_a_later_question_that_is_no_text_fails_its_row(tmp_path: Path) -> None:
    rows = [{"question": "q?"}] * 9 + [{"question": ["q?"]}]
    selection = _open(_jsonl(tmp_path, *rows))
    row = read_rows(selection.source, selection.spec, "test", [9])[0]
    assert row["error"] == "the question is no text: expected a text, got a list"


def test_answers_of_a_shape_that_is_not_known_fail_their_row(tmp_path: Path) -> None:
    selection = _open(_jsonl(tmp_path, {"question": "q?", "answer": {"value": "4"}}))
    row = read_rows(selection.source, selection.spec, "test", [0])[0]
    assert row["error"] == "expected texts, a list of them, or one under 'answer'; got a structure of value"


SPEC = DatasetSpec(
    question_column="question", image_column="image", answer_column="answer", image_optional=True
)


@pytest.mark.parametrize(
    "question",
    ["<image>\nWhy?", "<image>Why?", "Why?\n<image>", "<image 1> Why?", "<|image|>Why?", "<IMAGE>\n Why? "],
)
def test_a_mark_before_or_after_a_question_goes(question: str) -> None:
    """The image comes first anyway."""
    row = {"image": PNG, "question": question, "answer": "a"}
    assert to_sample(row, SPEC, "test-000000").question == "Why?"


@pytest.mark.parametrize(
    ("question", "parts"),
    [
        ("What does <image> show?", ["What does ", "image", " show?"]),
        ("<image>\n<image>\nWhy?", ["image", "image", "Why?"]),
        ("<image 1> or <|image_2|>?", ["image", "or ", "image", "?"]),
        ("Of <image> \n<image>", ["Of", "image", "image"]),
        ("a<image>b<image>", ["a", "image", "b", "image"]),
        ("Both?", ["image", "image", "Both?"]),
    ],
)
def test_images_stand_where_their_marks_do(question: str, parts: list[str]) -> None:
    images = [PNG] * parts.count("image")
    sample = to_sample({"image": images, "question": question, "answer": "a"}, SPEC, "test-000000")
    (message,) = format_data(sample)
    assert [part.get("text", part["type"]) for part in message["content"]] == parts


@pytest.mark.parametrize("question", ["<image>\n<image>\nWhy?", "<image_1> or <image_2>?", "<image>a<image>"])
def test_more_marks_than_images_fail_their_row(question: str) -> None:
    row = {"image": PNG, "question": question, "answer": "a"}
    with pytest.raises(ValueError, match=r"^the text has .*, and the row has 1 image$"):
        format_data(to_sample(row, SPEC, "test-000000"))
    sample = to_sample({**row, "image": None}, SPEC, "test-000000")
    assert sample.question == question  # it is about the text


def test_marks_for_images_that_no_column_has(tmp_path: Path) -> None:
    path = _jsonl(tmp_path, {"img_id": "17", "question": "<image>\nWhy?", "answer": "a"})
    assert _mistake(path) == (
        "--image_column is needed: questions begin or end with '<image>', and no column looks like images; "
        "pass it, or --image_column none to ask without images"
    )
    assert _open(path, image_column="none").spec.image_column is None
    _open(_jsonl(tmp_path, {"question": "What does <image> do in HTML?"}))


@pytest.mark.parametrize("question", ["Why?", "Is 3 < image > 2?", "<img src=x>", " Why? "])
def test_other_questions_stay_as_they_are(question: str) -> None:
    assert to_sample({"image": PNG, "question": question, "answer": "a"}, SPEC, "x").question == question


# Choices


def test_choices_that_the_prompt_asks_for_and_nobody_has(tmp_path: Path) -> None:
    path = _jsonl(tmp_path, {"image": "p.png", "question": "q?", "options": ["a", "b"], "answer": "B"})
    assert _mistake(path, prompt_template=LETTER_ANSWER) == (
        "--prompt_template has {choices}, and no column is taken for them; "
        "pass --choices_column, as one or several of image, question, options, answer"
    )
    assert _mistake(path, choices_column="A,B").startswith("--choices_column: ")
    selection = _open(path, prompt_template=LETTER_ANSWER, choices_column="options")
    (row,) = read_rows(selection.source, selection.spec, "test", [0])
    assert (row["choices"], row["answers"]) == (["a", "b"], ["B"])
    selection = _open(path)
    assert describe_columns(selection.source, selection.spec).endswith("; not used: options")


@pytest.mark.parametrize(
    "options", ["['red', 'blue']", '["red", "blue"]', ["red", "blue"], '[ "red","blue" ]', ("red", "blue")]
)
def test_lists_of_choices(options: Any) -> None:
    spec = DatasetSpec(question_column="question", answer_column="answer", choices_column="options")
    sample = to_sample({"question": "q?", "options": options, "answer": "1"}, spec, "x")
    assert (sample.choices, sample.answers) == (("red", "blue"), ("B",))


def test_choices_that_are_no_list_fail_their_row() -> None:
    spec = DatasetSpec(question_column="question", choices_column="options")
    with pytest.raises(ValueError, match=r"got the text 'A\. red B\. blue'"):
        to_sample({"question": "q?", "options": "A. red B. blue"}, spec, "x")


def test_a_table_of_vlmevalkit(tmp_path: Path) -> None:
    """Images in base64, a column for each choice, the last ones empty where there are fewer."""
    path = tmp_path / "bench.tsv"
    image = base64.b64encode(PNG + b"\0" * 200_000).decode()  # longer than a cell of `csv` may be by default
    rows = [
        ["1", image, "Which?", "red", "blue", "green", "NA", "C"],
        ["2", image, "Which?", "1.10", "2", "", "", "A"],
        ["3", image, "Which?", "1", "", "3", "", "C"],
    ]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerows([["index", "image", "question", "A", "B", "C", "D", "answer"], *rows])
    selection = _open(path, choices_column="A,B,C,D", prompt_template=LETTER_ANSWER)
    found = read_rows(selection.source, selection.spec, "test", range(3))
    assert found[0]["images"][0][: len(PNG)] == PNG
    assert [row["choices"] for row in found[:2]] == [["red", "blue", "green", "NA"], ["1.10", "2"]]
    assert [row["answers"] for row in found[:2]] == [["C"], ["A"]]
    assert [row["error"] for row in found] == [None, None, "no choice B, but one after it"]
    assert describe_columns(selection.source, selection.spec) == (
        "image from 'image', question from 'question', answer from 'answer', choices from 'A,B,C,D'; "
        "metric exact_match; images in 3 of the split's 3 rows; not used: index"
    )


# Copies of registered datasets


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ({"type": "x"}, None),
        ({"type": "human_test"}, "lmms-lab/ChartQA"),
        ({"answer_type": "number", "answers": ["a"]}, None),
        ({"question_types": ["form"], "answers": ["a"]}, None),
        ({"question_types": ["form"], "answers": ["a"], "ucsf_document_id": "x"}, "lmms-lab/DocVQA"),
        ({"family": "count", "answers": ["a"]}, None),
        ({"subject": "history", "choices": ["a", "b"]}, None),
        ({"query": "q?", "label": "a", "human_or_machine": "human"}, "HuggingFaceM4/ChartQA"),
    ],
)
def test_common_columns_do_not_make_a_copy(columns: dict[str, Any], name: str | None, tmp_path: Path) -> None:
    path = _jsonl(tmp_path, {"image": "p.png", "question": "q?", "answer": "a", **columns})
    spec = _open(path).spec
    if name:
        assert spec == DATASETS[name]
    else:
        assert (spec.metric, spec.family_column, spec.prompt_template) == ("exact_match", None, "{question}")


# What is said


@pytest.mark.parametrize("as_uri", [False, True])
def test_the_line_counts_the_rows_with_an_image(as_uri: bool, tmp_path: Path) -> None:
    images = [{"bytes": PNG, "path": None}, None, {"bytes": None, "path": None}, {"bytes": PNG, "path": None}]
    path = _parquet(tmp_path, image=images, question=["q?"] * 4, answer=["a"] * 4, more=[1] * 4)
    name = path.as_uri() if as_uri else str(path)
    selection = open_selection(QuestionsConfig(dataset_name=name), "test", "[:1]")
    assert describe_columns(selection.source, selection.spec) == (
        "image from 'image', question from 'question', answer from 'answer'; metric exact_match; "
        "images in 2 of the split's 4 rows; not used: more"
    )


def test_the_line_names_marks_and_missing_images(tmp_path: Path) -> None:
    path = _jsonl(tmp_path, {"image": "p.png", "question": "<image>q?"}, {"image": "", "question": "q?"})
    selection = _open(path)
    assert describe_columns(selection.source, selection.spec) == (
        "image from 'image', question from 'question'; metric exact_match; "
        "images in 1 of the split's 2 rows; "
        "an image stands where a question has <image>, and first where that is before or after it"
    )
    charts = get_dataset_columns("charts", ["image", "question", "answers", "family"])
    source = open_selection(QuestionsConfig(dataset_name="charts?num_rows=9"), "test", "[:]").source
    assert "images in 9 of the split's 9 rows" in describe_columns(source, charts)
