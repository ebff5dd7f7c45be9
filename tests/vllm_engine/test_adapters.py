"""Adapters of all that vLLM adapts, and `--verify_adapter`, which compares each with PEFT."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from helpers.adapters import build_adapter
from helpers.engines import make_request, texts
from vlmray.engines import build_engine
from vlmray.engines.transformers.engine import TransformersEngine
from vlmray.errors import OptionError
from vlmray.models.lora import LANGUAGE_TARGETS, MERGER_TARGETS, VISION_TARGETS

TARGETS = {
    "language": LANGUAGE_TARGETS,
    "vision": VISION_TARGETS,
    "merger": MERGER_TARGETS,
    "all": f"{LANGUAGE_TARGETS}|{VISION_TARGETS}|{MERGER_TARGETS}",
}


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: str(build_adapter(folder / name, tiny_model, target_modules=targets, seed=number))
        for number, (name, targets) in enumerate(TARGETS.items())
    }


@pytest.fixture(scope="module")
def verifying(tiny_model: Path, adapters: dict[str, str]) -> Iterator[Any]:
    """An engine that compared all of them with PEFT when it started."""
    engine = build_engine(
        engine="vllm", model_id=str(tiny_model), num_threads=1, adapters=[*adapters.values()],
        max_adapters=len(adapters), verify_adapter=True,
    )  # fmt: skip
    yield engine
    engine.close()


def test_all_parts_of_the_model_are_adapted_and_rows_mix(
    verifying: Any, model: Any, processor: Any, adapters: dict[str, str]
) -> None:
    other = TransformersEngine(model, processor)
    rows = [make_request(n, n % 3) for n in range(9)]
    requests = [dataclasses.replace(row, adapter=name) for row in rows for name in (None, *adapters)]
    for engine in (verifying, other):
        for name, path in adapters.items():
            engine.load_adapter(name, path)
    try:
        expected = other.generate(requests)
        assert verifying.generate(requests) == expected
    finally:
        for name in adapters:
            verifying.unload_adapter(name)
    each = len(adapters) + 1
    assert len({tuple(texts(expected[place::each])) for place in range(each)}) == each


def test_what_changed_since_it_was_compared_is_refused(verifying: Any, adapters: dict[str, str]) -> None:
    folder = Path(adapters["language"])
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    before = config.read_bytes(), weights.read_bytes()
    alpha = json.loads(before[0])
    try:
        config.write_text(json.dumps(alpha | {"lora_alpha": 2 * alpha["lora_alpha"]}))
        with pytest.raises(OptionError, match=r"^--verify_adapter: .* is answered otherwise than by a plain"):
            verifying.load_adapter("scaled", str(folder))
        config.write_bytes(before[0])
        save_file({name: 0 * weight for name, weight in load_file(weights).items()}, weights)
        with pytest.raises(OptionError, match=r"^--verify_adapter: .* changes no score here, and by"):
            verifying.load_adapter("empty", str(folder))
    finally:
        config.write_bytes(before[0])
        weights.write_bytes(before[1])
    verifying.load_adapter("as it was", str(folder))
    verifying.unload_adapter("as it was")


def test_what_came_later_is_refused(verifying: Any, adapters: dict[str, str], tmp_path: Path) -> None:
    later = shutil.copytree(adapters["vision"], tmp_path / "later")
    with pytest.raises(OptionError, match=r"^--verify_adapter compares adapters when vLLM starts, and .*er"):
        verifying.load_adapter("later", str(later))
