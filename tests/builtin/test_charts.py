"""Charts: rows are pure functions of their index, and every answer follows from the picture."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from vlmray.builtin import charts
from vlmray.builtin.canvas import Box, Chart
from vlmray.builtin.charts import KINDS, SPLITS, ChartDataset, ChartsConfig, Row, parse_charts_name
from vlmray.builtin.drawing import draw_chart
from vlmray.builtin.questions import FAMILIES
from vlmray.builtin.sampling import PLAIN


def dataset(name: str = "charts", split: str = "train") -> ChartDataset:
    return ChartDataset(parse_charts_name(name), split)


# --- rows ------------------------------------------------------------------------------------


def test_a_row_has_the_documented_columns() -> None:
    row = dataset()[3]
    assert set(row) == set(Row.__annotations__)
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


# --- answers, read again from the question's words ---------------------------------------------

Table = list[tuple[str, str, int]]  # label, colour, value of each mark, in reading order

MARK = "(?:bar|point|slice)"
COLOUR = f"(?:the )?(\\w+) {MARK}"
LARGEST, SMALLEST = "tallest|longest|highest|largest", "shortest|lowest|smallest"


def named(table: Table, name: str) -> tuple[str, str, int]:
    """Find the mark that a question means by 'the red bar' or by 'Ann'."""
    colour = re.fullmatch(COLOUR, name)
    (mark,) = [row for row in table if (row[1] == colour[1] if colour else row[0] == name)]
    return mark


def neighbour(table: Table, colour: str) -> str:
    order = [row[1] for row in table]
    return order[(order.index(colour) + 1) % len(order)]


def extreme(table: Table, adjective: str) -> tuple[str, str, int]:
    ranked = sorted(table, key=lambda row: row[2])
    return ranked[-1] if adjective in LARGEST.split("|") else ranked[0]


def listing(table: Table, what: str, first: str | None) -> str:
    """List a column of the table, from a colour on where marks go round."""
    start = [row[1] for row in table].index(first) if first else 0
    column = ("labels", "colours", "values").index(what)
    return ", ".join(str(row[column]) for row in table[start:] + table[:start])


# Family, pattern of the question, and how to answer it from the table `t`.
READERS: list[tuple[str, str, Callable[..., object]]] = [
    ("count", f"How many {MARK}s are there", lambda t: len(t)),
    ("count_above", f"How many {MARK}s are above (\\d+)(?: percent)?",
     lambda t, n: sum(r[2] > int(n) for r in t)),
    ("position", f"What colour is the (leftmost|rightmost|top|bottom) {MARK}",
     lambda t, end: t[0 if end in ("leftmost", "top") else -1][1]),
    ("position", f"What colour is the {MARK} just (?:right of|below|clockwise from) (\\w+)", neighbour),
    ("naming", f"Which label has (the \\w+ {MARK})", lambda t, a: named(t, a)[0]),
    ("naming", f"What colour is the {MARK} of (\\w+)", lambda t, a: named(t, a)[1]),
    ("extreme", f"What colour is the ({LARGEST}|{SMALLEST}) {MARK}", lambda t, a: extreme(t, a)[1]),
    ("extreme", f"Which label has the ({LARGEST}|{SMALLEST}) {MARK}", lambda t, a: extreme(t, a)[0]),
    ("highest", "What is the (highest) (?:value|percent)", lambda t, a: extreme(t, a)[2]),
    ("lowest", "What is the (lowest) (?:value|percent)", lambda t, a: extreme(t, a)[2]),
    ("value_by_colour", f"What (?:is the value of|percent is) (the \\w+ {MARK})",
     lambda t, a: named(t, a)[2]),
    ("value_by_label", "What (?:is the value of|percent is) (\\w+)", lambda t, a: named(t, a)[2]),
    ("comparison", "Is (.+) larger than (.+)",
     lambda t, a, b: "yes" if named(t, a)[2] > named(t, b)[2] else "no"),
    ("list", f"List the (\\w+) of the {MARK}s "
     "(?:from left to right|from top to bottom|clockwise from (\\w+))", listing),
    ("difference", "What is the difference between (.+) and (.+)",
     lambda t, a, b: max(named(t, a)[2], named(t, b)[2]) - min(named(t, a)[2], named(t, b)[2])),
]  # fmt: skip


def test_every_answer_follows_from_the_chart() -> None:
    view, used = dataset("charts?num_rows=600&seed=3"), set()
    for index, row in enumerate(view):
        chart = view.chart(index)
        table = list(zip(chart.labels, chart.colours, chart.values, strict=True))
        readings = [
            (number, str(read(table, *match.groups())))
            for number, (family, pattern, read) in enumerate(READERS)
            if family == row["family"] and (match := re.fullmatch(pattern + "[?.]", row["question"]))
        ]
        assert [answer for _, answer in readings] == row["answers"], row["question"]
        used.add(readings[0][0])
    assert used == set(range(len(READERS)))


def test_values_are_distinct_and_readable() -> None:
    view = dataset()
    for index in range(0, 1000, 2):
        chart = view.chart(index)
        assert (
            len(set(chart.values)) == len(set(chart.labels)) == len(set(chart.colours)) == len(chart.values)
        )
        if chart.kind == "pie":
            assert sum(chart.values) == 100
        else:
            assert min(chart.values) > 0
            assert max(chart.values) <= chart.scale.top
            assert all(value % chart.scale.step == 0 for value in chart.values)


def test_values_are_printed_or_can_be_read_off_the_axis() -> None:
    view = dataset("charts?questions_per_image=1")
    for index in range(200):
        chart = view.chart(index)
        printed = {number for item in draw_chart(chart).texts for number in re.findall("\\d+", item.text)}
        if chart.kind == "pie" or chart.style.print_values:
            assert printed >= set(map(str, chart.values))
        else:
            assert chart.style.grid
            assert printed >= set(map(str, range(0, chart.scale.top + 1, chart.scale.tick)))
            assert chart.scale.top // chart.scale.step == 10


# --- pictures ----------------------------------------------------------------------------------


def overlap(one: Box, other: Box) -> bool:
    apart = one.right <= other.left or other.right <= one.left
    return not (apart or one.bottom <= other.top or other.bottom <= one.top)


def test_texts_neither_overlap_nor_leave_the_picture() -> None:
    view = dataset("charts?questions_per_image=1")
    for index in range(400):
        chart = view.chart(index)
        boxes = [item.box for item in draw_chart(chart).texts]
        width, height = chart.style.size
        for number, box in enumerate(boxes):
            assert min(box.left, box.top, width - box.right, height - box.bottom) >= 0, index
            assert not any(overlap(box, other) for other in boxes[:number]), index


def find_pixels(chart: Chart, png: bytes) -> list[np.ndarray]:
    """Return the (x, y) of the pixels that have exactly a mark's colour, for each mark."""
    pixels = np.asarray(Image.open(io.BytesIO(png)))
    return [np.argwhere((pixels == fill).all(axis=-1))[:, ::-1] for fill in chart.fills]


def count_pixels(chart: Chart, png: bytes) -> list[int]:
    return [len(found) for found in find_pixels(chart, png)]


@pytest.mark.parametrize("kind", ["bar", "hbar", "pie"])
def test_marks_cover_pixels_in_the_order_of_their_values(kind: str) -> None:
    view, compared = dataset(f"charts?kind={kind}&questions_per_image=1"), 0
    for index in range(60):
        chart = view.chart(index)
        counts = count_pixels(chart, view[index]["image"])
        assert min(counts) > 0
        for value, pixels in zip(chart.values, counts, strict=True):
            for other_value, other_pixels in zip(chart.values, counts, strict=True):
                # Printed numbers, rounding and outlines cost some pixels: closer values may tie.
                if value - other_value >= 0.12 * chart.scale.top:
                    compared += 1
                    assert pixels > other_pixels, (index, chart)
    assert compared > 100


@pytest.mark.parametrize("kind", ["bar", "hbar", "pie"])
def test_marks_cover_pixels_in_proportion_to_their_values(kind: str) -> None:
    view, compared = dataset(f"charts?kind={kind}&questions_per_image=1"), 0
    for index in range(150):
        chart = view.chart(index)
        style, in_legend = chart.style, chart.style.legend != "none"
        numbers_on_slices = kind == "pie" and (style.print_values or not in_legend)
        if style.outline or numbers_on_slices:
            continue
        swatch = (style.font_size - 2) ** 2 if in_legend else 0
        pixels = np.array(count_pixels(chart, view[index]["image"])) - swatch
        shares = np.array(chart.values) / sum(chart.values)
        assert np.abs(pixels / pixels.sum() - shares).max() < 0.03, index
        compared += 1
    assert compared > 20


def test_labels_stand_at_their_marks() -> None:
    view = dataset("charts?questions_per_image=1")
    for index in range(160):
        chart, row = view.chart(index), view[index]
        texts = {item.text.split()[0]: item.box for item in draw_chart(chart).texts}
        boxes = [texts[label] for label in chart.labels]
        marks = find_pixels(chart, row["image"])
        if chart.style.legend == "none":
            assert nearest_marks(chart, boxes, marks) == list(range(len(boxes))), index
        else:
            image = Image.open(io.BytesIO(row["image"]))
            beside = [image.getpixel((round(box.left) - 8, round(box.centre[1]))) for box in boxes]
            assert beside == list(chart.fills), index


def nearest_marks(chart: Chart, boxes: list[Box], marks: list[np.ndarray]) -> list[int]:
    """Return which mark is nearest to each label: along the axis, or in the plane for a pie."""
    axes = {"bar": [0], "line": [0], "hbar": [1], "pie": [0, 1]}[chart.kind]
    centres = np.array([box.centre for box in boxes])[:, axes]
    distances = [np.linalg.norm(centres - mark.mean(axis=0)[axes], axis=1) for mark in marks]
    return np.array(distances).argmin(axis=0).tolist()


def test_every_point_of_a_line_shows_its_colour() -> None:
    view = dataset("charts?kind=line&questions_per_image=1")
    for index in range(40):
        assert min(count_pixels(view.chart(index), view[index]["image"])) >= 12


def test_pictures_are_small_rgb_images_of_the_stated_size() -> None:
    view = dataset("charts?num_rows=40&questions_per_image=1")
    for index, row in enumerate(view):
        image = Image.open(io.BytesIO(row["image"]))
        assert (image.mode, image.size) == ("RGB", view.chart(index).style.size)
        assert image.width % 28 == image.height % 28 == 0
        assert len(row["image"]) < 20_000


# --- names and errors --------------------------------------------------------------------------


def test_names_parse() -> None:
    assert parse_charts_name("charts") == parse_charts_name("charts?") == ChartsConfig()
    assert parse_charts_name("charts?num_rows=200&seed=7&family=difference") == ChartsConfig(
        num_rows=200, seed=7, family="difference"
    )
    assert parse_charts_name("charts?family=extreme%2Ccount").families == ("count", "extreme")
    assert ChartsConfig().families == FAMILIES
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
