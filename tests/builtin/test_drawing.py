"""Charts are drawn as they say: marks, labels and texts stand where they belong."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from helpers.charts import dataset
from vlmray.builtin.canvas import Box, Chart
from vlmray.builtin.drawing import draw_chart


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
