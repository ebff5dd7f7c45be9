"""Adapters and the base in one engine: each answers as it would alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from helpers.engines import generate_alone, load, make_mixed_requests, make_request, texts
from vlmray.engines import build_engine
from vlmray.engines.fake import build_tiny_random_adapter
from vlmray.engines.transformers.engine import TransformersEngine


def test_adapters_and_base_mix_in_one_call_and_match_peft(
    tiny_model: Path, tiny_adapter: Path, tmp_path: Path, processor: Any
) -> None:
    from peft import PeftModel

    second = build_tiny_random_adapter(tmp_path / "second", tiny_model, seed=2)
    rows = [make_request(n, n % 3) for n in range(6)]
    expected: dict[str | None, list[str]] = {}
    for name, path in ((None, None), ("chart-v1.0", tiny_adapter), ("b", second)):
        base = load(tiny_model)
        peft_model = base if path is None else PeftModel.from_pretrained(base, path)
        expected[name] = [generate_alone(peft_model, processor, row) for row in rows]
    engine = TransformersEngine(load(tiny_model), processor)
    engine.load_adapter("chart-v1.0", str(tiny_adapter))
    engine.load_adapter("b", str(second))
    names = [None, "chart-v1.0", "b"]
    requests = [dataclasses.replace(row, adapter=name) for row in rows for name in names]
    found = texts(engine.generate(requests))
    for place, name in enumerate(names):
        assert found[place::3] == expected[name]
    assert len({tuple(column) for column in expected.values()}) == 3
    with pytest.raises(ValueError, match="loaded already"):
        engine.load_adapter("b", str(second))
    engine.close()


def test_adapters_and_base_share_a_forward_pass(
    tiny_model: Path, tiny_adapter: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TransformersEngine(load(tiny_model), processor)
    engine.load_adapter("named", str(tiny_adapter))
    passes = []
    generate = engine.model.generate
    monkeypatch.setattr(
        engine.model,
        "generate",
        lambda **kwargs: passes.append(kwargs["input_ids"].shape) or generate(**kwargs),
    )
    texts(engine.generate([make_request(n, adapter=None if n % 2 else "named") for n in range(6)]))
    assert [shape[0] for shape in passes] == [6]
    engine.close()


def test_adapters_of_the_vision_tower_are_kept_apart(
    tiny_model: Path, tiny_adapter: Path, tmp_path: Path, processor: Any
) -> None:
    seeing = build_tiny_random_adapter(tmp_path / "seeing", tiny_model, seed=3, lora_vision=True)
    engine = TransformersEngine(load(tiny_model), processor)
    rows = [make_request(n) for n in range(4)]
    for name, path in (("reading", tiny_adapter), ("seeing", seeing)):
        engine.load_adapter(name, str(path))
    names = [None, "reading", "seeing"]
    alone = [texts(engine.generate([dataclasses.replace(r, adapter=name) for r in rows])) for name in names]
    mixed = texts(engine.generate([dataclasses.replace(r, adapter=name) for r in rows for name in names]))
    assert [mixed[place::3] for place in range(3)] == alone
    assert len(set(map(tuple, alone))) == 3
    engine.close()


def test_an_unloaded_adapter_is_unknown_and_can_be_loaded_again(
    tiny_model: Path, tiny_adapter: Path, processor: Any
) -> None:
    engine = TransformersEngine(load(tiny_model), processor)
    row = make_request(1)
    base = texts(engine.generate([row]))
    engine.load_adapter("named", str(tiny_adapter))
    named = texts(engine.generate([dataclasses.replace(row, adapter="named")]))
    engine.unload_adapter("named")
    (completion,) = engine.generate([dataclasses.replace(row, adapter="named")])
    assert completion.error == "ValueError: unknown adapter 'named'; known: none"
    assert texts(engine.generate([row])) == base
    with pytest.raises(ValueError, match="no adapter named 'named' is loaded; known: none"):
        engine.unload_adapter("named")
    engine.load_adapter("named", str(tiny_adapter))
    assert texts(engine.generate([dataclasses.replace(row, adapter="named")])) == named != base
    engine.close()


def test_a_default_adapter_answers_requests_that_name_none(tiny_model: Path, tiny_adapter: Path) -> None:
    rows = make_mixed_requests(4)
    base = build_engine(engine="transformers", model_id=str(tiny_model))
    assert isinstance(base, TransformersEngine)
    base.load_adapter("named", str(tiny_adapter))
    named = texts(base.generate([dataclasses.replace(row, adapter="named") for row in rows]))
    tuned = build_engine(engine="transformers", model_id=str(tiny_model), adapter=str(tiny_adapter))
    assert texts(tuned.generate(rows)) == named != texts(base.generate(rows))


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantized_base_answers_as_before_whatever_was_loaded(
    tiny_model: Path, tiny_adapter: Path, quantization: str
) -> None:
    requests = make_mixed_requests(6)
    engine = build_engine(
        engine="transformers", model_id=str(tiny_model), quantization=quantization, batch_size=1
    )
    assert isinstance(engine, TransformersEngine)
    before = texts(engine.generate(requests))
    engine.load_adapter("a", str(tiny_adapter))
    adapted = texts(engine.generate([dataclasses.replace(request, adapter="a") for request in requests]))
    assert texts(engine.generate(requests)) == before != adapted
    engine.unload_adapter("a")
    assert texts(engine.generate(requests)) == before
    engine.close()
