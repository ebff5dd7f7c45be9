"""Rows with two images are compared like any others, through a server."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from helpers.rows import make_image
from vlmray.benchmark.job import run_benchmark
from vlmray.benchmark.plan import plan_benchmark
from vlmray.config import BenchmarkConfig
from vlmray.engines import build_engine
from vlmray.schema import GenerationRequest

NUM_ROWS = 8


@pytest.mark.usefixtures("two_cpus")
def test_rows_with_two_images_are_answered_as_the_engine_does(tiny_model: Path, tmp_path: Path) -> None:
    pictures = [make_image(60 * number, size=(56, 84)) for number in range(4)]
    for number, picture in enumerate(pictures):
        (tmp_path / f"{number}.png").write_bytes(picture)
    pairs = [(number % 4, (number + 1 + number // 4) % 4) for number in range(NUM_ROWS)]
    lines = [
        {"images": [f"{first}.png", f"{second}.png"], "question": f"Which of {first}?", "answer": "x"}
        for first, second in pairs
    ]
    dataset = tmp_path / "pairs.jsonl"
    dataset.write_text("\n".join(map(json.dumps, lines)))
    config = BenchmarkConfig(
        models=f"base={tiny_model}", dataset_name=str(dataset), prompt_template="{question}", dtype="float32",
        engine="transformers", max_new_tokens=12, speed_samples=0, output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    run_benchmark(plan_benchmark(config))
    rows = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    found = {row["sample_id"]: row["prediction"] for row in rows}

    engine = build_engine(engine="transformers", model_id=str(tiny_model), dtype="float32")
    parts = [{"type": "image"}, {"type": "image"}]
    requests = [
        GenerationRequest(
            request_id=f"test-{number:06d}", images=[pictures[first], pictures[second]], max_new_tokens=12,
            messages=[{"role": "user", "content": [*parts, {"type": "text", "text": f"Which of {first}?"}]}],
        )
        for number, (first, second) in enumerate(pairs)
    ]  # fmt: skip
    expected = {
        request.request_id: completion.text
        for request, completion in zip(requests, engine.generate(requests), strict=True)
    }
    engine.close()
    assert len(set(expected.values())) > 2
    assert found == expected
