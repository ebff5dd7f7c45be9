"""Planning a run of inference, and what it knows of its rows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from vlmray.config import InferConfig, SamplingConfig
from vlmray.dataset.sources import open_source
from vlmray.inference.plan import plan_inference
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
    run.folder.save(rows, [{}, {}, {}], [JPEG, None, JPEG])
    drawn = [row["image"] for row in open_source(CHARTS, "test").read(range(3), ["image"])]
    written = output_format != "parquet"
    expected = [JPEG, drawn[1], JPEG] if written else drawn
    assert [run.read_image(row) for row in run.folder.rows()] == expected


def test_how_answers_are_drawn_is_part_of_what_a_run_is_resumed_for(tmp_path: Path) -> None:
    def plan(**drawn: Any) -> Task:
        config = InferConfig(
            engine="fake", model_id="fake", dataset_name=CHARTS, sample_slices="[:]", output_format="files",
            output_dir=str(tmp_path), **drawn,
        )  # fmt: skip
        run = plan_inference(config)
        if not any(run.folder.rows()):
            run.folder.save([Row(sample_id="test-000000", row_index=0, error=None)], [{}], [None])
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
