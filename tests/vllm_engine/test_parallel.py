"""A model in parts, each in a process of its own, on CPUs as on GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.engines import make_mixed_requests
from vlmray.engines import build_engine
from vlmray.engines.transformers.engine import TransformersEngine


@pytest.mark.parametrize("parts", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_workers_share_a_model(tiny_model: Path, model: Any, processor: Any, parts: str) -> None:
    requests = make_mixed_requests(9)
    engine: Any = build_engine(engine="vllm", model_id=str(tiny_model), num_threads=1, **{parts: 2})
    try:
        assert engine.generate(requests) == TransformersEngine(model, processor).generate(requests)
    finally:
        engine.close()
