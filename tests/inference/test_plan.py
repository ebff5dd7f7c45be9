"""Planning a run of inference, and what it knows of its rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmray.config import InferConfig
from vlmray.dataset.sources import open_source
from vlmray.inference.plan import plan_inference
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
