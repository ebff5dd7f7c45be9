"""How the pipeline cuts its work, without Ray."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import ray.cloudpickle as cloudpickle

from vlmray.config import InferConfig
from vlmray.inference import pipeline
from vlmray.inference.chunks import CacheUse, Chunk, Finished, pack, unpack
from vlmray.inference.pipeline import _chunk_size, _RowSource
from vlmray.inference.plan import plan_inference
from vlmray.inference.timeline import Span
from vlmray.schema import Row


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "num_replicas", "expected"),
    [
        (48, 4, 1, 12),
        (100, 64, 1, 25),
        (2500, 64, 1, 64),
        (2500, 64, 8, 64),
        (2500, 128, 1, 128),
        (10_000, 64, 1, 156),
        (10_000, 64, 8, 64),
        (1_000_000, 64, 1, 512),
        (1_000_000, 1, 1, 512),
        (1_000_000, 64, 64, 244),
        (10**9, 64, 1, 512),
    ],
)
def test_a_chunk_is_larger_where_there_are_many_rows(
    num_rows: int, batch_size: int, num_replicas: int, expected: int
) -> None:
    assert _chunk_size(num_rows, batch_size, num_replicas) == expected


@pytest.mark.parametrize("slices", ["[:]", "[::-1]", "[:10],[500:]"])
def test_tasks_of_a_million_rows_are_few_and_small(
    slices: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.ray, "put", lambda value: None)
    config = InferConfig(
        engine="fake", model_id="fake", dataset_name="charts?num_rows=1000000", sample_slices=slices,
        output_dir=str(tmp_path),
    )  # fmt: skip
    run = plan_inference(config)
    tasks = _RowSource(run, _chunk_size(len(run.pending), 64, 1)).get_read_tasks(1)
    assert len(tasks) == -(-len(run.pending) // 512)
    assert sum(task.metadata.num_rows for task in tasks) == len(run.pending)
    num_bytes = 12_000 if "," in slices else 3_000
    assert max(len(cloudpickle.dumps(task)) for task in tasks[::100]) < num_bytes


def test_a_chunk_travels_as_one_row() -> None:
    spans = [Span("read", 1.0, 2.0), Span("generate", 2.0, 3.5, 0.5, "a")]
    for chunk in (Chunk([{"sample_id": "a-1", "image": b"\xff" * 100_000}], spans), Finished(3, 1, spans)):
        block = pack(chunk)
        assert block.num_rows == 1
        assert unpack(block) == chunk
        assert type(unpack(pickle.loads(pickle.dumps(block)))) is type(chunk)


def test_what_caches_had_is_summed_over_rows_whose_engine_says_so() -> None:
    rows: list[Row] = [
        {"num_prompt_tokens": 600, "num_cached_tokens": 0},
        {"num_prompt_tokens": 400, "num_cached_tokens": 250},
        {"num_prompt_tokens": 900, "num_cached_tokens": None},
        {"num_prompt_tokens": None, "error": "no image"},
    ]
    use = CacheUse.of(rows)
    assert use.share == 0.25
    assert use.plus(CacheUse(1000, 250)) == CacheUse(2000, 500)
    assert CacheUse.of(rows[2:]).share is None  # not 0: nobody knows
