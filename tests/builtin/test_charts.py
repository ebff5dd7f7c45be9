"""Charts: rows are pure functions of their index, and every answer follows from the picture."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import subprocess
import sys
from collections import Counter
from itertools import combinations

import pytest
from PIL import Image

from helpers.charts import dataset
from vlmray.builtin import charts
from vlmray.builtin.charts import KINDS, SPLITS, ChartRow, ChartsConfig, parse_charts_name
from vlmray.builtin.questions import FAMILIES
from vlmray.builtin.random_charts import PLAIN


def test_a_row_has_the_documented_columns() -> None:
    row = dataset()[3]
    assert set(row) == set(ChartRow.__annotations__)
    assert Image.open(io.BytesIO(row["image"])).format == "PNG"
    assert row["image_id"] == "train-000001"
    assert row["question"].endswith("?")
    assert len(row["answers"]) == 1


def test_rows_do_not_depend_on_order_or_instance() -> None:
    once = dataset()
    backwards = [once[index] for index in reversed(range(20))][::-1]
    assert backwards == [once[index] for index in range(20)]
    assert backwards == [dataset()[index] for index in range(20)]


def test_rows_do_not_depend_on_the_process() -> None:
    code = (
        "import hashlib; from vlmray.builtin.charts import ChartDataset, ChartsConfig;"
        "rows = repr([ChartDataset(ChartsConfig(), 'test')[index] for index in range(8)]);"
        "print(hashlib.sha256(rows.encode()).hexdigest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        )
        for salt in ("1", "2")
    ]
    here = repr([dataset(split="test")[index] for index in range(8)])
    assert {run.stdout.strip() for run in runs} == {hashlib.sha256(here.encode()).hexdigest()}


@pytest.mark.parametrize("name", ["charts?num_rows=60", "charts?num_rows=60&questions_per_image=5&seed=3"])
def test_what_is_asked_is_known_without_drawing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(dataset(name, "test"))
    monkeypatch.setattr(charts, "draw_chart", lambda chart: pytest.fail("a chart was drawn"))
    view = dataset(name, "test")
    for index, row in reversed(list(enumerate(rows))):
        assert {**view.ask(index), "image_id": view.image_id(index), "image": row["image"]} == row
    for one, other in combinations(rows, 2):
        assert (one["image_id"] == other["image_id"]) == (one["image"] == other["image"])


def test_num_rows_only_says_where_a_split_ends() -> None:
    assert len(dataset("charts?num_rows=7")) == 7
    assert list(dataset("charts?num_rows=7")) == [dataset()[index] for index in range(7)]


def test_splits_and_seeds_share_no_chart() -> None:
    names = ["charts?num_rows=60", "charts?num_rows=60&seed=1"]
    views = [dataset(name, split) for name in names for split in SPLITS]
    images = [row["image"] for view in views for row in view]
    assert len(set(images)) == len(images) / 2  # two rows an image


@pytest.mark.parametrize("per_image", [1, 2, 5, len(FAMILIES)])
def test_rows_of_one_image_ask_different_questions(per_image: int) -> None:
    rows = list(dataset(f"charts?num_rows={per_image * 12}&questions_per_image={per_image}"))
    for start in range(0, len(rows), per_image):
        group = rows[start : start + per_image]
        assert len({row["image"] for row in group}) == len({row["image_id"] for row in group}) == 1
        assert len({row["question"] for row in group}) == len({row["family"] for row in group}) == per_image
    assert len({row["image"] for row in rows}) == 12


@pytest.mark.parametrize("family", ["position", "extreme", "value_by_label", "comparison", "difference"])
def test_one_family_still_asks_different_questions(family: str) -> None:
    rows = list(dataset(f"charts?num_rows=60&family={family}&questions_per_image=3"))
    for start in range(0, len(rows), 3):
        assert len({row["question"] for row in rows[start : start + 3]}) == 3


def test_families_take_turns() -> None:
    counts = Counter(row["family"] for row in dataset(f"charts?num_rows={len(FAMILIES) * 12}"))
    assert counts == dict.fromkeys(FAMILIES, 12)
    comparisons = Counter(row["answers"][0] for row in dataset("charts?num_rows=300&family=comparison"))
    assert min(comparisons["yes"], comparisons["no"]) > 100


def test_a_family_named_twice_is_asked_twice_as_often() -> None:
    rows = list(
        dataset("charts?num_rows=400&family=difference,count,difference,difference&questions_per_image=8")
    )
    assert Counter(row["family"] for row in rows) == {"difference": 300, "count": 100}
    for start in range(0, len(rows), 8):
        asked = [row["question"] for row in rows[start : start + 8] if row["family"] == "difference"]
        assert len(set(asked)) == len(asked) == 6


def test_plain_charts_differ_in_what_they_say_alone() -> None:
    charts = [dataset("charts?style=plain&kind=bar").chart(index) for index in range(0, 200, 2)]
    assert {chart.style for chart in charts} == {PLAIN}
    assert {chart.title for chart in charts} == {""}
    assert {label for chart in charts for label in chart.labels} == set("ABCDEFGH")
    assert len({(chart.colours, chart.values) for chart in charts}) == 100


def test_filters_are_obeyed() -> None:
    view = dataset("charts?num_rows=60&family=count,extreme&kind=pie, line")
    assert {row["family"] for row in view} == {"count", "extreme"}
    assert {view.chart(index).kind for index in range(60)} == {"line", "pie"}
    assert {dataset().chart(index).kind for index in range(100)} == set(KINDS)


def test_restricting_the_families_keeps_the_charts() -> None:
    assert dataset("charts?family=count")[8]["image"] == dataset()[8]["image"]


def test_pickles_small_even_after_drawing() -> None:
    view = dataset("charts?seed=5&family=count,extreme")
    row = view[11]
    pickled = pickle.dumps(view)
    assert len(pickled) < 1000
    assert pickle.loads(pickled)[11] == row


LARGEST, SMALLEST = "tallest|longest|highest|largest", "shortest|lowest|smallest"


def test_names_parse() -> None:
    assert parse_charts_name("charts") == parse_charts_name("charts?") == ChartsConfig()
    assert parse_charts_name("charts?num_rows=200&seed=7&family=difference") == ChartsConfig(
        num_rows=200, seed=7, family="difference"
    )
    assert parse_charts_name("charts?family=extreme%2Ccount").families == ("count", "extreme")
    assert ChartsConfig().families == FAMILIES
    assert "record" not in FAMILIES
    assert parse_charts_name("charts?family=record").families == ("record",)
    assert ChartsConfig(kind="pie,bar").kinds == ("bar", "pie")
    for config in (ChartsConfig(), ChartsConfig(num_rows=3, family="count, list", style="plain")):
        assert parse_charts_name(config.name) == config


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chartqa", "expected a name like 'charts'.*, got 'chartqa'"),
        ("charts?rows=3", "unknown parameter 'rows'; known: .*num_rows.*questions_per_image"),
        ("charts?num_rows", "num_rows must be a whole number, got ''"),
        ("charts?num_rows=1e3", "num_rows must be a whole number, got '1e3'"),
        ("charts?num_rows=0", "num_rows must be at least 1, got 0"),
        ("charts?seed=-1", "seed must be at least 0, got -1"),
        ("charts?seed=1&seed=2", "'seed' is given twice"),
        ("charts?questions_per_image=0", "questions_per_image must be at least 1"),
        ("charts?family=cuont", "unknown family 'cuont'; known: count, .*difference"),
        ("charts?family=", "unknown family ''; known"),
        ("charts?style=fancy", "unknown style 'fancy'; known: varied, plain"),
        ("charts?kind=bar,donut", "unknown kind 'donut'; known: bar, hbar, line, pie"),
    ],
)
def test_bad_names_say_what_is_known(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_charts_name(name)


def test_unknown_split_lists_the_splits() -> None:
    with pytest.raises(ValueError, match="unknown split 'val'; known: train, validation, test"):
        dataset(split="val")


@pytest.mark.parametrize("index", [-1, 1000])
def test_out_of_range_is_an_index_error(index: int) -> None:
    with pytest.raises(IndexError, match=f"row {index} is out of range, train has 1000 rows"):
        dataset()[index]
    for read in (dataset().chart, dataset().ask, dataset().image_id):
        with pytest.raises(IndexError):
            read(index)
