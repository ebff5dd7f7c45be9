"""Rows of a selection: read once, in any chunks, by their index."""

from __future__ import annotations

import random
from itertools import groupby
from typing import Any

import pytest

from helpers.rows import SPEC, TASK, ListSource, check_travels, make_image
from vlmray.builtin import charts
from vlmray.dataset.columns import get_dataset_columns
from vlmray.dataset.registry import DatasetSpec
from vlmray.dataset.rows import group_by_image, read_chunk, read_images, read_rows
from vlmray.dataset.slices import parse_sample_slices
from vlmray.dataset.sources import open_source
from vlmray.inference.stages import (
    prepare_rows,
)


def _runs(rng: random.Random) -> ListSource:
    """Make rows in runs of equal images, some without an image, some runs alike."""
    rows: list[dict[str, Any]] = []
    for _ in range(rng.randint(1, 15)):
        image = rng.choice([None, b"0", b"1", {"bytes": b"2", "path": "x"}, "http://127.0.0.1:9/a.png"])
        rows += [{"question": "Why?", "image": image, "answer": "x"}] * rng.randint(1, 6)
    return ListSource(rows)


def _random_selection(rng: random.Random, num_rows: int) -> list[int]:
    while True:
        start, stop = (rng.choice([None, rng.randint(-num_rows, num_rows)]) for _ in range(2))
        selected = list(range(num_rows))[start : stop : rng.choice([1, 1, 1, 2, 3, -1, -2])]
        if rng.random() < 0.2:
            selected = [index for index in selected if rng.random() < 0.7]  # what resuming leaves
        if selected:
            return selected


def test_chunks_partition_the_selection() -> None:
    rng = random.Random(0)
    for _ in range(1500):
        source = _runs(rng)
        selected = _random_selection(rng, len(source))
        size = rng.randint(1, 9)
        chunks = []
        for start in range(0, len(selected), size):
            # A Ray task is given the row before its chunk and a chunk more, not the whole selection.
            first = max(0, start - 1)
            near = selected[first : start + 2 * size + 1]
            whole = read_chunk(source, SPEC, "test", selected, start, start + size)
            assert read_chunk(source, SPEC, "test", near, start - first, start - first + size) == whole
            chunks.append([row["row_index"] for row in whole])
        assert [index for chunk in chunks for index in chunk] == selected
        _check_runs(source, selected, size, chunks)


def test_rows_with_one_image_come_together_where_the_first_stands() -> None:
    rng = random.Random(1)
    images = [
        None,
        b"0",
        {"bytes": b"1", "path": "x"},
        {"bytes": None, "path": "x"},
        "y",
        [b"0", b"1"],
        [b"1", b"0"],
    ]
    for _ in range(300):
        chosen = [rng.choice(images) for _ in range(rng.randint(1, 40))]
        source = ListSource([{"question": "Why?", "image": image, "answer": "x"} for image in chosen])
        selected = _random_selection(rng, len(source))
        found = list(group_by_image(source, SPEC, selected))
        expected: dict[Any, list[int]] = {}
        for index in selected:
            key = repr(chosen[index]) if chosen[index] is not None else index
            expected.setdefault(key, []).append(index)
        assert found == [index for group in expected.values() for index in group]


def test_rows_stay_where_nothing_is_to_be_moved() -> None:
    charts = open_source("charts?num_rows=40", "test")
    spec = get_dataset_columns("charts?num_rows=40", charts.column_names)
    assert group_by_image(charts, spec, range(40)) == range(40)
    shuffled = random.Random(2).sample(range(40), 40)
    names = [
        charts.read([index], ["image_id"])[0]["image_id"] for index in group_by_image(charts, spec, shuffled)
    ]
    assert len([*groupby(names)]) == len(set(names)) < 40


def _check_runs(source: ListSource, selected: list[int], size: int, chunks: list[list[int]]) -> None:
    """A run of one image that is not longer than a chunk is in one chunk; no chunk is over twice its size."""
    assert max(map(len, chunks)) <= 2 * size
    chunk_of = {index: number for number, chunk in enumerate(chunks) for index in chunk}
    for image, run in groupby(selected, key=lambda index: source.read([index])[0]["image"]):
        indices = list(run)
        if image is not None and len(indices) <= size:
            assert len({chunk_of[index] for index in indices}) == 1


def test_rows_without_images_are_not_moved() -> None:
    rows = [{"question": f"{number}?", "image": None, "answer": "x"} for number in range(10)]
    plain = DatasetSpec(question_column="question")
    for spec in (SPEC, plain):
        chunks = [read_chunk(ListSource(rows), spec, "test", range(10), at, at + 4) for at in (0, 4, 8)]
        assert [len(chunk) for chunk in chunks] == [4, 4, 2]


def test_rows_carry_what_the_dataset_says() -> None:
    name = "charts?num_rows=40&seed=5"
    source = open_source(name, "test")
    spec = get_dataset_columns(name, source.column_names)
    selected = parse_sample_slices("[-3:],[::13]", len(source))
    rows = read_chunk(source, spec, "test", selected, 0, len(selected))
    for index, row in zip(selected, rows, strict=True):
        (expected,) = source.read([index])
        assert row["sample_id"] == f"test-{index:06d}"
        assert row["row_index"] == index
        assert row["error"] is None
        assert row["images"] == [expected["image"]]
        for column in ("question", "answers", "family"):
            assert row[column] == expected[column]


def test_rows_by_index_are_those_of_chunks() -> None:
    name = "charts?num_rows=20"
    source = open_source(name, "test")
    spec = get_dataset_columns(name, source.column_names)
    whole = read_chunk(source, spec, "test", range(20), 0, 20)
    for order in ([7, 3, 3, 19, 0], [], range(20)):
        assert read_rows(source, spec, "test", order) == [whole[index] for index in order]


def test_a_row_that_is_no_sample_is_an_error_row() -> None:
    rows = [
        {"question": "<image> Why?", "image": None, "answer": "x"},
        {"question": "Why?", "image": make_image(), "answer": "x"},
    ]
    broken, fine = read_chunk(ListSource(rows), SPEC, "test", [0, 1], 0, 2)
    assert (broken["sample_id"], broken["row_index"]) == ("test-000000", 0)
    assert broken["error"] == "no image in column 'image'"
    assert fine["error"] is None
    check_travels(prepare_rows([broken, fine], TASK))


def test_the_image_of_a_row() -> None:
    images = [make_image(1), None, {"bytes": make_image(2), "path": "x"}, "http://127.0.0.1:9/a.png"]
    source = ListSource([{"question": "", "image": image, "answer": "x"} for image in images])
    found = [read_images(source, SPEC, "test", index) for index in range(4)]
    assert found == [[make_image(1)], [], [make_image(2)], []]


def test_chunks_of_charts_are_cut_without_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("charts?num_rows=40&questions_per_image=4", "train")
    spec = get_dataset_columns("charts", source.column_names)
    monkeypatch.setattr(charts, "draw_chart", lambda chart: pytest.fail("a chart was drawn"))
    monkeypatch.setattr("vlmray.dataset.rows.read_rows", lambda source, spec, split, indices: indices)
    chunks = [read_chunk(source, spec, "train", range(40), start, start + 6) for start in range(0, 40, 6)]
    assert [index for chunk in chunks for index in chunk] == list(range(40))
    assert all(chunk[0] % 4 == 0 for chunk in chunks if chunk)
