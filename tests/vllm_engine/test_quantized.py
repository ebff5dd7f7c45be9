"""Checkpoints that are quantized: vLLM answers as the weights do that their numbers mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.common.requests import read_requests
from helpers.processes import parquet_rows, run
from helpers.quantized import quantize
from vlmray.builtin.models import BUILTIN_FOLDER
from vlmray.config import InferConfig
from vlmray.engines import build_engine

CHARTS = ["--dataset_name", "charts?num_rows=60", "--sample_slices", "[:]", "--max_new_tokens", 16]


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_four_bits_a_weight(tmp_path: Path, method: str) -> None:
    quantized, twin, out = tmp_path / "quantized", tmp_path / "twin", tmp_path / "out"
    quantize(method, BUILTIN_FOLDER, quantized, twin)
    done = run(*CHARTS, "--engine", "vllm", "--model_id", quantized, "--output_dir", out)
    assert done.returncode == 0, done.stderr
    found = {name: row["prediction"] for name, row in parquet_rows(out).items()}
    expected = answers(twin, out)
    assert sum(found[name] == text for name, text in expected.items()) >= 0.95 * len(expected)
    assert len(set(found.values())) > 10  # so that nonsense would show


def answers(model: Path, out: Path) -> dict[str, str]:
    config = InferConfig(
        model_id=str(model), dataset_name="charts?num_rows=60", sample_slices="[:]", max_new_tokens=16,
        output_dir=str(out.parent / "unused"),
    )  # fmt: skip
    requests = read_requests(config)
    engine = build_engine(engine="transformers", model_id=str(model), dtype="float32")
    completions = engine.generate(requests)
    engine.close()
    return {
        request.request_id: completion.text for request, completion in zip(requests, completions, strict=True)
    }


def test_what_vllm_refuses_is_one_line(tmp_path: Path) -> None:
    quantize("awq", BUILTIN_FOLDER, tmp_path / "quantized", tmp_path / "twin")
    with pytest.raises(ValueError, match=r"vLLM refuses its options: torch.float32 is not supported .* awq"):
        build_engine(engine="vllm", model_id=str(tmp_path / "quantized"), dtype="float32")
