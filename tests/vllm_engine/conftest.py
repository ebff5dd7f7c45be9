"""Engines over vLLM; the tests are left out where that is not installed (`make test-vllm` sets it up)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.engines import load
from vlmray.engines import build_engine
from vlmray.models.processors import load_processor

HAS_VLLM = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture(scope="session")
def model(tiny_model: Path) -> Any:
    return load(tiny_model)


@pytest.fixture(scope="session")
def processor(tiny_model: Path) -> Any:
    return load_processor(str(tiny_model))


@pytest.fixture(scope="session")
def engine(tiny_model: Path, tiny_adapter: Path) -> Iterator[Any]:
    """One over the tiny model; it starts in a minute, so all tests share it."""
    engine = build_engine(
        engine="vllm", model_id=str(tiny_model), num_threads=1, adapters=[str(tiny_adapter)], max_adapters=1
    )
    yield engine
    engine.close()
