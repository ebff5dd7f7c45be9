"""`--verify_adapter`: what is answered otherwise than by PEFT is refused, whatever went wrong."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.adapters import APART, MIXING, build_adapter
from vlmray.config import BenchmarkConfig, InferConfig, ServeConfig
from vlmray.engines import build_engine
from vlmray.engines.transformers import engine as module
from vlmray.engines.verifying import Scores, check_agreement, probes, score_apart, score_by_peft
from vlmray.errors import OptionError
from vlmray.models.adapters import Adapter, load_adapter

DIFFERS = r"^--verify_adapter: .* is answered otherwise than by a plain pass of PEFT: the scores"


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Any:
    return build_engine(engine="transformers", model_id=str(tiny_model), verify_adapter=True)


@pytest.mark.parametrize("kind", ["plain", "rank-pattern", "lm_head-lora", "dora", "vision", "bias-all"])
def test_every_kind_is_answered_as_by_peft(
    engine: Any, tiny_model: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = build_adapter(tmp_path / kind, tiny_model, **(MIXING | APART)[kind])
    with caplog.at_level(logging.INFO):
        engine.load_adapter(kind, str(adapter))
    engine.unload_adapter(kind)
    found = re.search(r"changes the probes' scores by (\S+); .* PEFT's to (\S+), of the base", caplog.text)
    assert found is not None
    assert float(found[1]) > 100 * float(found[2])  # or a fault would not show


def without_effect(adapter: Adapter) -> Adapter:
    return Adapter({}, adapter.mixes)


def of_wrong_scale(adapter: Adapter) -> Adapter:
    for layer in adapter.parts.values():
        layer.scaling["default"] *= 1.5
    return adapter


def without_a_layer(adapter: Adapter) -> Adapter:
    last = [*adapter.parts][-1]
    return Adapter({place: part for place, part in adapter.parts.items() if place != last}, adapter.mixes)


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (without_effect, r"^--verify_adapter: .* changes no score here, and by \S+ in a plain pass of PEFT"),
        (of_wrong_scale, DIFFERS),
        (without_a_layer, DIFFERS),
    ],
)
def test_an_adapter_that_was_loaded_wrongly_is_refused(
    engine: Any,
    tiny_adapter: Path,
    fault: Callable[[Adapter], Adapter],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "load_adapter", lambda model, path: fault(load_adapter(model, path)))
    with pytest.raises(OptionError, match=problem):
        engine.load_adapter("wrong", str(tiny_adapter))
    monkeypatch.undo()
    engine.load_adapter("right", str(tiny_adapter))
    engine.unload_adapter("right")


def test_a_config_that_changed_behind_the_engine_is_noticed(
    engine: Any, tiny_adapter: Path, tmp_path: Path
) -> None:
    changed = shutil.copytree(tiny_adapter, tmp_path / "changed")
    config = json.loads((changed / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(
        json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]})
    )
    served, after = (
        score_by_peft(engine.model, engine.processor, str(path)) for path in (tiny_adapter, changed)
    )
    check_agreement("a", served, served, torch.float32)
    with pytest.raises(OptionError, match=DIFFERS):
        check_agreement("a", after, served, torch.float32)


def test_a_process_apart_scores_as_this_one(engine: Any, tiny_model: Path, tiny_adapter: Path) -> None:
    config = InferConfig(sample_slices="[:]", adapter="a", verify_adapter=True)
    (found,) = score_apart(str(tiny_model), config, [str(tiny_adapter)]).values()
    here = score_by_peft(engine.model, engine.processor, str(tiny_adapter))
    check_agreement("a", found, here, torch.float32)
    with pytest.raises(OptionError, match=r"^--verify_adapter needs the model as transformers loads it, "):
        score_apart(str(tiny_model), config, ["./nowhere"])


def test_a_wrong_scale_is_found_below_what_rounding_explains() -> None:
    base = {token: -1.0 - token for token in range(20)}
    noisy = {token: score + 0.01 * (-1) ** token for token, score in base.items()}

    def after(scores: dict[int, float], scale: float) -> dict[int, float]:
        return {token: score + scale * 0.2 * (token % 3 - 1) for token, score in scores.items()}

    plain = Scores([base], [after(base, 1.0)])
    check_agreement("a", plain, Scores([noisy], [after(noisy, 1.1)]), torch.bfloat16)
    with pytest.raises(OptionError, match=r"has 50% of the effect that a plain pass of PEFT shows"):
        check_agreement("a", plain, Scores([noisy], [after(noisy, 0.5)]), torch.bfloat16)


def test_rounding_is_tolerated_as_the_precision_has_it() -> None:
    plain = Scores([{1: -1.0, 2: -2.0}], [{1: -1.5, 2: -1.25}])
    served = Scores([{1: -1.01}], [{1: -1.51}])  # where nothing is far above rounding
    check_agreement("a", plain, served, torch.bfloat16)
    with pytest.raises(OptionError, match=r"differ by 0\.01, those of the base by 0\.01"):
        check_agreement("a", plain, served, torch.float32)
    untrained = Scores(plain.base, plain.base)
    check_agreement("a", untrained, untrained, torch.float32)


def test_probes_are_a_text_and_a_picture() -> None:
    assert [len(request.images) for request in probes()] == [0, 1]


def test_there_has_to_be_an_adapter() -> None:
    for make in (
        lambda: InferConfig(sample_slices="[:]", verify_adapter=True),
        lambda: ServeConfig(verify_adapter=True),
        lambda: BenchmarkConfig(models="a=builtin", verify_adapter=True),
    ):
        with pytest.raises(OptionError, match=r"^--verify_adapter has no adapter to compare; "):
            make()
