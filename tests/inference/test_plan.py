"""Planning a run of inference, and what it knows of its rows."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from vlmray.config import InferConfig, SamplingConfig
from vlmray.dataset.sources import open_source
from vlmray.inference.plan import InferenceRun, plan_inference
from vlmray.inference.stages import Task
from vlmray.schema import Row

JPEG = b"\xff\xd8 as good as a picture here"
CHARTS = "charts?num_rows=3"


@pytest.mark.parametrize("output_format", ["files", "parquet", "both"])
def test_the_image_of_a_result_is_the_one_written_or_else_the_source_s(
    output_format: str, tmp_path: Path
) -> None:
    config = InferConfig(
        engine="fake", model_id="fake", dataset_name=CHARTS, sample_slices="[:]", output_dir=str(tmp_path),
        output_format=output_format,  # type: ignore[arg-type]
    )  # fmt: skip
    run = plan_inference(config)
    rows = [Row(sample_id=f"test-{index:06d}", row_index=index, error=None) for index in range(3)]
    run.folder.save(rows, [{}, {}, {}], [[JPEG], [None], [JPEG]])
    drawn = [row["image"] for row in open_source(CHARTS, "test").read(range(3), ["image"])]
    written = output_format != "parquet"
    expected = [JPEG, drawn[1], JPEG] if written else drawn
    assert [run.read_images(row) for row in run.folder.rows()] == [[image] for image in expected]


def test_how_answers_are_drawn_is_part_of_what_a_run_is_resumed_for(tmp_path: Path) -> None:
    def plan(**drawn: Any) -> Task:
        config = InferConfig(
            engine="fake", model_id="fake", dataset_name=CHARTS, sample_slices="[:]", output_format="files",
            output_dir=str(tmp_path), **drawn,
        )  # fmt: skip
        run = plan_inference(config)
        if not any(run.folder.rows()):
            run.folder.save([Row(sample_id="test-000000", row_index=0, error=None)], [{}], [()])
        return run.task

    assert plan(top_k=5, repetition_penalty=1.2).top_k == 5
    assert plan(top_k=5, repetition_penalty=1.2).repetition_penalty == 1.2
    for drawn in ({}, {"top_k": 6, "repetition_penalty": 1.2}, {"top_k": 5, "repetition_penalty": 1.0}):
        with pytest.raises(ValueError, match="holds another run"):
            plan(**drawn)
    options = tmp_path / "options.json"
    names = {field.name for field in dataclasses.fields(SamplingConfig)} - {"temperature", "top_p"}
    recorded = json.loads(options.read_text())
    options.write_text(json.dumps({name: recorded[name] for name in recorded.keys() - names}))
    assert plan().repetition_penalty is None  # as a folder that was written before there were such options


def test_a_run_over_a_million_rows_is_planned_with_few_bytes_for_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def plan(slices: str) -> InferenceRun:
        config = InferConfig(
            engine="fake", model_id="fake", dataset_name="charts?num_rows=1000000", sample_slices=slices,
            output_dir=str(tmp_path),
        )  # fmt: skip
        return plan_inference(config)

    with caplog.at_level("INFO"):
        run = plan("[:]")
    assert "1,000,000 rows are written as Parquet alone" in caplog.text
    assert run.selected == run.pending == range(1_000_000)
    done = range(0, 3000, 2)
    for part in (done[:700], done[700:]):
        run.folder.write_part([Row(sample_id=f"test-{at:06d}", row_index=at, error=None) for at in part])
    failed = Row(sample_id="test-999999", row_index=999_999, error="late")
    run.folder.write_part([failed])
    tracemalloc.start()
    again = plan("[:]")
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()
    assert len(again.pending) == 1_000_000 - len(done)
    assert list(again.pending[:3]) == [1, 3, 5]
    assert again.pending[-1] == 999_999
    assert len(again.folder.rows(["sample_id"])) == len(done)  # what failed is taken out
    assert plan("[3000:]").pending == range(3000, 1_000_000)
    assert plan("[1::2]").pending == range(1, 1_000_000, 2)
    assert not plan("[:3000:2]").pending
