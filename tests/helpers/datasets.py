"""The same rows, written in every way a dataset may lie on a disk."""

from __future__ import annotations

import pickle
import random
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from vlmray.dataset.sources import Source, open_source
from vlmray.images.reading import load_image_pil

NUM_ROWS = 23


def png(number: int) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def hf_dataset(start: int = 0, stop: int = NUM_ROWS) -> datasets.Dataset:
    """Make rows whose columns all say their number."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "query": datasets.Value("string"),
            "label": datasets.List(datasets.Value("string")),
            "human_or_machine": datasets.ClassLabel(names=["human", "machine"]),
        }
    )
    numbers = range(start, stop)
    columns = {
        "image": [{"bytes": png(number), "path": None} for number in numbers],
        "query": [f"question {number}" for number in numbers],
        "label": [[str(number), f"number {number}"] for number in numbers],
        "human_or_machine": [number % 2 for number in numbers],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def check_rows(source: Source, num_rows: int = NUM_ROWS) -> None:
    """Read in any order, with repeats, before and after pickling: the number in a row is its index."""
    assert len(source) == num_rows
    rng = random.Random(0)
    pickled = pickle.dumps(source)
    assert len(pickled) < 10_000
    orders = [
        range(num_rows),
        reversed(range(num_rows)),
        [rng.randrange(num_rows) for _ in range(40)],
        [],
        [0],
    ]
    for copy in (source, pickle.loads(pickled)):
        assert list(copy.column_names) == list(source.column_names)
        assert (copy.on_driver, copy.base_dir) == (source.on_driver, source.base_dir)
        for order in map(list, orders):
            rows = copy.read(order)
            assert [row["query"] for row in rows] == [f"question {index}" for index in order]
            for index, row in zip(order, rows, strict=True):
                check_row(row, index)


def check_row(row: dict[str, Any], index: int) -> None:
    if "human_or_machine" in row:
        assert row["human_or_machine"] == ("human", "machine")[index % 2]
    if "label" in row:
        assert row["label"] == [str(index), f"number {index}"]
    if isinstance(row.get("image"), dict):
        assert load_image_pil(row["image"]).getpixel((0, 0)) == (index, 0, 0)


def mistake(name: object, split: str = "test", config: str | None = None) -> str:
    with pytest.raises(ValueError, match="--dataset_") as error_info:
        open_source(str(name), split, config)
    message = str(error_info.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def parquet_folder(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    hf_dataset().to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    hf_dataset(100, 105).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


def parquet_file(folder: Path) -> Path:
    path = folder / "rows.parquet"
    hf_dataset().to_parquet(path)
    return path


def saved(folder: Path) -> Path:
    hf_dataset().save_to_disk(folder / "saved")
    return folder / "saved"


def saved_splits(folder: Path) -> Path:
    splits = datasets.DatasetDict({"test": hf_dataset(), "train": hf_dataset(100, 105)})
    splits.save_to_disk(folder / "splits")
    return folder / "splits"
