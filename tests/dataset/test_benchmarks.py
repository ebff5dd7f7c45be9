"""Benchmarks whose rows are in pieces: they are asked and scored as lmms-eval does it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.rows import make_image
from vlmray.config import InferConfig
from vlmray.dataset.columns import get_dataset_columns
from vlmray.dataset.rows import image_columns, read_chunk, read_rows
from vlmray.dataset.selection import Selection, describe_columns, open_selection
from vlmray.errors import OptionError
from vlmray.inference.stages import Task, prepare_rows
from vlmray.schema import Row

CHARTQAPRO: list[tuple[dict[str, Any], str, list[str], str | None]] = [
    ({"Question": [" How many? "], "Answer": ["7"]}, "How many?", ["7"], None),
    ({"Paragraph": " Sales fell.\n"}, "Context: Sales fell.\n\nWhich?", ["3"], None),
    ({"Question Type": "Fact Checking", "Answer": ["True"]}, "Which?", ["True"], "chartqapro_exact"),
    ({"Question Type": "Multi Choice", "Answer": ["b"]}, "Which?", ["b"], "chartqapro_exact"),
    ({"Year": ["YES"]}, "Which?", ["3"], "chartqapro_exact"),
    ({"Year": []}, "Which?", ["3"], None),
    ({"Year": ["Yes"], "Answer": ["[2010, 2011]"]}, "Which?", ["[2010, 2011]"], "chartqapro_exact"),
    ({"Year": ["YES", "NO"], "Answer": ["2010"]}, "Which?", ["2010"], "chartqapro_exact"),
    ({"Year": ["YES", "NO"], "Answer": ["[2010, 7]"]}, "Which?", [], None),
    (
        {"Question Type": "Conversational", "Question": ["When? ", "What?", "And then?"],
         "Answer": ["2010", " 5", "6"], "Year": ["YES", "NO", "NO"], "Paragraph": "Sales."},
        "Context: Sales.\n\nQ1: When?\nA1: 2010\nQ2: What?\nA2: 5\nQ3: And then?", ["6"], None,
    ),
    (
        {"Question Type": "Conversational", "Question": ["What?", "When?"], "Answer": ["5", "2010"],
         "Year": ["NO", "YES"]},
        "Q1: What?\nA1: 5\nQ2: When?", ["2010"], "chartqapro_exact",
    ),
]  # fmt: skip


def _open(path: Path, split: str = "test", **options: Any) -> Selection:
    config = InferConfig(dataset_name=str(path), dataset_split=split, sample_slices="[:]", **options)
    return open_selection(config, split, "[:]")


def _rows(found: Selection) -> list[Row]:
    return read_rows(found.source, found.spec, found.split, list(found.selected))


def test_rows_of_chartqapro_are_worded_and_scored_by_their_type_and_years(tmp_path: Path) -> None:
    usual = {
        "Question": ["Which?"], "Answer": ["3"], "Question Type": "Factoid", "Year": ["NO"], "Paragraph": "",
        "image": make_image(1),
    }  # fmt: skip
    path = tmp_path / "copy.parquet"
    pq.write_table(pa.Table.from_pylist([usual | row for row, *_ in CHARTQAPRO]), path)
    found = _open(path)
    assert found.spec.metric == "chartqapro_accuracy"
    assert "not used" not in describe_columns(found.source, found.spec)
    rows = _rows(found)
    for row, (own, question, answers, metric) in zip(rows, CHARTQAPRO, strict=True):
        assert (row["error"], row["question"]) == (None, question)
        assert (row["answers"], row["own_metric"]) == (answers, metric), own
        assert row["family"] == own.get("Question Type", "Factoid")
        assert row["images"] == [make_image(1)]
    task = Task(prompt_template=found.spec.prompt_template, metric=found.spec.metric)
    asked = prepare_rows(rows[:1], task)[0]["messages"]
    assert asked is not None
    assert "How many?\\nAnswer the question with a short phrase." in asked


@pytest.fixture
def gqa(tmp_path: Path) -> Path:
    """Two configurations, as the hub has them."""
    questions = [
        {"id": f"q{number}", "imageId": f"n{image}", "question": f"Is it {number}?", "answer": "yes",
         "fullAnswer": "Yes, it is."}
        for number, image in enumerate([2, 0, 0, 1, 0, 9])
    ]  # fmt: skip
    features = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = [
        {"id": f"n{number}", "image": {"bytes": make_image(number), "path": None}} for number in range(3)
    ]
    schema = pa.schema({"id": pa.string(), "image": features})
    for name, table in (
        ("dev_instructions", pa.Table.from_pylist(questions)),
        ("dev_images", pa.Table.from_pylist(images, schema)),
    ):
        (tmp_path / name).mkdir()
        pq.write_table(table, tmp_path / name / "testdev-00000.parquet")
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: testdev\n    path: {name}/testdev-*\n"
        for name in ("dev_instructions", "dev_images")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return tmp_path


def test_questions_of_gqa_find_their_images(gqa: Path) -> None:
    found = _open(gqa, "testdev", dataset_config="dev_instructions")
    assert (found.spec.metric, found.spec.image_column) == ("gqa_accuracy", "image")
    rows = _rows(found)
    shown = [row["images"] for row in rows]
    assert shown == [*([make_image(number)] for number in (2, 0, 0, 1, 0)), []]
    assert [row["error"] for row in rows] == [None] * 5 + ["no image in column 'image'"]
    assert [row["answers"] for row in rows] == [["yes"]] * 6
    source = pickle.loads(pickle.dumps(found.source))
    assert read_rows(source, found.spec, "testdev", [3, 0]) == [rows[3], rows[0]]
    assert source.fingerprint() == found.source.fingerprint()
    assert image_columns(source, found.spec) == ["imageId"]
    assert len(read_chunk(source, found.spec, "testdev", found.selected, 0, 2)) == 3  # one image, one chunk


def test_questions_of_gqa_without_the_images_beside_them_are_refused() -> None:
    with pytest.raises(OptionError, match="lmms-lab/GQA has no column 'image'"):
        get_dataset_columns("lmms-lab/GQA", ["id", "imageId", "question", "answer", "fullAnswer"])
