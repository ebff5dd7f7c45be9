"""A model that two processes share answers as one alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.engines import generate_alone, make_mixed_requests, texts
from vlmray.engines import build_engine


def test_two_processes_answer_as_one(tiny_model: Path, model: Any, processor: Any) -> None:
    requests = make_mixed_requests(9)
    engine: Any = build_engine(engine="vllm", model_id=str(tiny_model), num_threads=1, tensor_parallel_size=2)
    try:
        assert engine._running.llm.vllm_config.parallel_config.world_size == 2
        found = texts(engine.generate(requests))
    finally:
        engine.close()
    assert found == [generate_alone(model, processor, request) for request in requests]
