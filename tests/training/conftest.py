"""The tiny model and its processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText

from vlmray.models.processors import load_processor


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    return load_processor(str(tiny_model))


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(tiny_model).eval()
