"""Sources: the same rows at the same index however a dataset is kept, and one line for what is wrong."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.datasets import NUM_ROWS, check_rows, mistake, parquet_file, parquet_folder, saved, saved_splits
from helpers.paths import CHARTQA
from vlmray.builtin import charts
from vlmray.builtin.drawing import draw_chart
from vlmray.dataset.columns import get_dataset_columns
from vlmray.dataset.registry import DATASETS
from vlmray.dataset.samples import to_sample
from vlmray.dataset.slices import sample_id
from vlmray.dataset.sources import Source, display_name, open_source
from vlmray.images.reading import load_image_pil


@pytest.mark.parametrize("write", [parquet_folder, parquet_file, saved, saved_splits])
def test_local_datasets(write: Callable[[Path], Path], tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path)), "test")
    assert source.on_driver
    assert list(source.column_names) == ["image", "query", "label", "human_or_machine"]
    check_rows(source)


def test_splits_are_kept_apart(tmp_path: Path) -> None:
    for name in (parquet_folder(tmp_path / "a"), saved_splits(tmp_path)):
        assert [row["query"] for row in open_source(str(name), "train").read([4, 0])] == [
            "question 104",
            "question 100",
        ]
        assert mistake(name, "val") in (
            f"--dataset_split 'val': {name} has train, test",
            f"--dataset_split 'val': {name} has test, train",
        )


def _check_columns(source: Source) -> None:
    """Any columns in any order of rows are those columns of the whole rows."""
    order = [5, 2, 2, 7, 0]
    whole = source.read(order)
    names = list(source.column_names)
    rng = random.Random(0)
    for columns in [[name] for name in names] + [
        rng.sample(names, rng.randint(1, len(names))) for _ in range(8)
    ]:
        rows = source.read(order, columns)
        assert rows == [{name: row[name] for name in columns} for row in whole]
        assert source.read([], columns) == []
    assert source.read(order, names) == source.read(order) == whole


@pytest.mark.parametrize("write", [parquet_folder, parquet_file, saved, saved_splits])
def test_columns_of_local_datasets(write: Callable[[Path], Path], tmp_path: Path) -> None:
    _check_columns(open_source(str(write(tmp_path)), "test"))


def test_columns_of_other_sources(parquet_parts: Path, tmp_path: Path) -> None:
    _check_columns(open_source(parquet_parts.as_uri(), "test"))
    _check_columns(open_source("charts?num_rows=12", "test"))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"query": f"{n}", "image": "a.png", "n": n}) for n in range(9)))
    _check_columns(open_source(str(path), "test"))


def test_a_chart_is_drawn_only_for_its_image(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw = draw_chart
    monkeypatch.setattr(charts, "draw_chart", lambda chart: drawn.append(chart) or draw(chart))
    source = open_source("charts?num_rows=12", "test")
    source.read(range(12), ["image_id", "question", "answers", "family"])
    assert not drawn
    source.read([4], ["answers", "image"])
    assert len(drawn) == 1


def test_a_row_that_is_not_there(parquet_parts: Path) -> None:
    for name in (str(parquet_parts), parquet_parts.as_uri(), "charts?num_rows=23"):
        for columns in (None, ["question" if name.startswith("charts") else "query"]):
            with pytest.raises(IndexError):
                open_source(name, "test").read([NUM_ROWS], columns)


def test_charts() -> None:
    source = open_source("charts?num_rows=12&seed=3", "test")
    assert (len(source), source.on_driver, source.base_dir) == (12, False, None)
    pickled = pickle.dumps(source)
    assert len(pickled) < 1000
    order = [7, 3, 3, 11, 0]
    assert pickle.loads(pickled).read(order) == [source.read([index])[0] for index in order]
    assert set(source.read([0])[0]) == set(source.column_names)


def test_mistakes_with_charts() -> None:
    assert mistake("charts?rows=3").startswith(
        "--dataset_name: charts: unknown parameter 'rows'; known: num_rows"
    )
    assert mistake("charts", "dev").startswith("--dataset_split: charts: unknown split 'dev'; known: train")


@pytest.mark.skipif(not CHARTQA.is_dir(), reason=f"no real ChartQA at {CHARTQA}")
@pytest.mark.parametrize("as_uri", [False, True])
def test_real_chartqa(as_uri: bool) -> None:
    source = open_source(CHARTQA.as_uri() if as_uri else str(CHARTQA), "test")
    spec = get_dataset_columns(str(CHARTQA), source.column_names)
    assert spec == DATASETS["HuggingFaceM4/ChartQA"]
    rows = source.read(range(len(source)))
    samples = [to_sample(row, spec, sample_id("test", index)) for index, row in enumerate(rows)]
    assert len(samples) == 600
    assert [sum(sample.family == name for sample in samples) for name in ("human", "augmented")] == [300, 300]
    assert all(sample.answers and sample.question for sample in samples)
    assert len({sample.images for sample in samples}) == 370
    load_image_pil(samples[0].images[0])


def test_nothing_at_the_path(tmp_path: Path) -> None:
    for name in (tmp_path / "gone", tmp_path / "gone.parquet", "./gone", "gone.jsonl", "~/gone"):
        assert mistake(name) == f"--dataset_name {name}: no such file or folder"
    assert mistake((tmp_path / "gone").as_uri()).endswith("/gone: no Parquet file there")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("charts", "Built-in charts, 1,000 rows"),
        ("charts?seed=7&num_rows=2400&family=count", "Built-in charts, 2,400 rows"),
        ("charts?num_rows=1", "Built-in charts, 1 row"),
        ("HuggingFaceM4/ChartQA", "HuggingFaceM4/ChartQA"),
        ("photos.jsonl", "photos.jsonl"),
        ("data/photos/", "data/photos/"),
        ("/data", "/data"),
        ("/home/someone/photos/photos.jsonl", "…/photos/photos.jsonl"),
        ("s3://bucket/receipts/2026/*.parquet", "…/2026/*.parquet"),
        ("s3://bucket", "s3://bucket"),
    ],
)
def test_a_dataset_has_a_name_to_read(name: str, shown: str) -> None:
    assert display_name(name) == shown


def test_a_registered_name_is_shown_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "/mnt/our/receipts", DATASETS["charts"])
    assert display_name("/mnt/our/receipts", "2026") == "/mnt/our/receipts, 2026"
