"""Fixtures of the datasets' tests."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow.parquet as pq
import pytest

from helpers.datasets import NUM_ROWS, hf_dataset, parquet_file


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` makes out of the user's cache, and every test off the network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def parquet_parts(tmp_path: Path) -> Path:
    """Several files of several row groups, an empty file and an empty row group among them."""
    folder = tmp_path / "parts of it"
    folder.mkdir()
    table = hf_dataset().data.table
    schema = pq.read_schema(parquet_file(tmp_path))  # with the notes of `datasets`
    starts = [0, 7, 7, 16, NUM_ROWS]
    for part, (start, stop) in enumerate(pairwise(starts)):
        rows = table.slice(start, stop - start).cast(schema)
        with pq.ParquetWriter(folder / f"test-{part:05}.parquet", schema) as writer:
            for first in range(0, len(rows), 3):
                writer.write_table(rows.slice(first, 3))
                writer.write_table(rows.slice(0, 0))
    hf_dataset(100, 105).to_parquet(folder / "train-00000.parquet")
    (folder / "README.md").write_text("not data")
    return folder
