"""Adapters of every kind beside others, after them and after failures: each answers as PEFT has it alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from helpers.adapters import APART, MIXING, answer_by_peft, build_adapter
from helpers.engines import load, make_request, texts
from vlmray.engines import build_engine
from vlmray.engines.transformers.engine import TransformersEngine
from vlmray.models.adapter_kinds import tell_kind
from vlmray.models.adapters import load_adapter
from vlmray.models.checks import check_adapter_folder
from vlmray.models.merging import merge_adapter
from vlmray.models.processors import load_processor
from vlmray.schema import GenerationRequest

ROWS = [make_request(number, number % 3) for number in range(4)]
KINDS = MIXING | APART

Expect = Callable[[str], list[str]]


@pytest.fixture(scope="module")
def tied_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with one matrix for embeddings and head, as the smaller ones of Qwen's have it."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("models") / "tied"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    return {kind: build_adapter(root / kind, tiny_model, **options) for kind, options in KINDS.items()}


@pytest.fixture(scope="module")
def expect(tiny_model: Path, folders: dict[str, Path], processor: Any) -> Expect:
    """What plain PEFT answers to `ROWS` with one kind alone, or with none (`base`)."""
    known: dict[str, list[str]] = {}

    def answer(kind: str) -> list[str]:
        if kind not in known:
            known[kind] = answer_by_peft(tiny_model, folders.get(kind), processor, ROWS)
        return known[kind]

    return answer


@pytest.fixture(scope="module")
def engine(tiny_model: Path, folders: dict[str, Path], processor: Any) -> Iterator[TransformersEngine]:
    """One engine for all tests of this module, so that each meets what those before it left."""
    engine = TransformersEngine(load(tiny_model), processor)
    for kind in ("plain", "rslora"):
        engine.load_adapter(kind, str(folders[kind]))
    yield engine
    engine.close()


def ask(engine: TransformersEngine, *kinds: str) -> dict[str, list[str]]:
    """Ask everything of several adapters, and of the base, in one call whose rows take turns."""
    requests = [for_kind(row, kind) for row in ROWS for kind in kinds]
    found = texts(engine.generate(requests))
    return {kind: found[place :: len(kinds)] for place, kind in enumerate(kinds)}


def for_kind(row: GenerationRequest, kind: str) -> GenerationRequest:
    return dataclasses.replace(row, adapter=None if kind == "base" else kind)


def state_of(model: Any) -> dict[str, Any]:
    return {name: (part, part.detach().clone()) for name, part in model.state_dict(keep_vars=True).items()}


def is_as_before(model: Any, before: dict[str, Any]) -> bool:
    now = model.state_dict(keep_vars=True)
    same = all(now[name] is part and torch.equal(part, copy) for name, (part, copy) in before.items())
    return now.keys() == before.keys() and same


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_answered_as_peft_alone_has_it(
    engine: TransformersEngine, folders: dict[str, Path], expect: Expect, kind: str, monkeypatch: Any
) -> None:
    before = state_of(engine.model)
    engine.load_adapter("loaded", str(folders[kind]))
    expected = {"loaded": expect(kind)} | {other: expect(other) for other in ("base", "plain", "rslora")}
    assert len(set(map(tuple, expected.values()))) >= 3
    assert expected["loaded"] != expected["base"]
    assert ask(engine, "loaded") == {"loaded": expect(kind)}
    assert ask(engine, "base", "loaded", "plain", "rslora") == expected
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "generate", fail)
        for names in (["loaded"], ["loaded", "base"], ["plain", "base"]):
            failed = engine.generate([for_kind(row, name) for row in ROWS for name in names])
            assert {each.error for each in failed} == {"RuntimeError: of the test"}
    assert ask(engine, "plain", "rslora", "loaded", "base") == expected
    engine.unload_adapter("loaded")
    del expected["loaded"]
    assert ask(engine, "plain", "rslora", "base") == expected
    assert is_as_before(engine.model, before)


def fail(**_: Any) -> None:
    raise RuntimeError("of the test")


def test_all_kinds_at_once(engine: TransformersEngine, folders: dict[str, Path], expect: Expect) -> None:
    for kind in KINDS.keys() - {"plain", "rslora"}:
        engine.load_adapter(kind, str(folders[kind]))
    expected = {kind: expect(kind) for kind in ("base", *KINDS)}
    assert ask(engine, "base", *KINDS) == expected
    for kind in KINDS.keys() - {"plain", "rslora"}:
        engine.unload_adapter(kind)
    assert ask(engine, "base", "plain", "rslora") == {k: expected[k] for k in ("base", "plain", "rslora")}


def test_only_what_is_added_to_rows_shares_a_forward_pass(tiny_model: Path, folders: dict[str, Path]) -> None:
    model = load(tiny_model)
    mixes = {kind: load_adapter(model, str(folder)).mixes for kind, folder in folders.items()}
    assert mixes == dict.fromkeys(MIXING, True) | dict.fromkeys(APART, False)


@pytest.mark.parametrize("kind", ["dora", "bias-all", "vision"])
def test_a_default_adapter_of_any_kind(
    tiny_model: Path, folders: dict[str, Path], expect: Expect, kind: str
) -> None:
    engine = build_engine(engine="transformers", model_id=str(tiny_model), adapter=str(folders[kind]))
    assert isinstance(engine, TransformersEngine)
    engine.load_adapter("plain", str(folders["plain"]))
    assert ask(engine, "base", "plain") == {"base": expect(kind), "plain": expect("plain")}
    engine.close()


def test_a_family_that_is_run_whole(tiny_llava: Path, tmp_path: Path) -> None:
    processor = load_processor(str(tiny_llava))
    options: dict[str, dict[str, Any]] = {
        kind: APART[kind] for kind in ("dora", "bias-all", "saved-lm_head", "vision", "tokens")
    }
    options |= {"plain": {}, "projector": {"modules_to_save": ["multi_modal_projector"]}}
    engine = TransformersEngine(load(tiny_llava), processor)
    before = state_of(engine.model)
    expected = {"base": answer_by_peft(tiny_llava, None, processor, ROWS)}
    for kind, option in options.items():
        adapter = build_adapter(tmp_path / kind, tiny_llava, **option)
        expected[kind] = answer_by_peft(tiny_llava, adapter, processor, ROWS)
        engine.load_adapter(kind, str(adapter))
    assert ask(engine, *expected) == expected
    assert len(set(map(tuple, expected.values()))) == len(expected)
    assert is_as_before(engine.model, before)
    engine.close()


def test_a_mixed_batch_that_does_not_fit_is_halved_without_a_trace(
    engine: TransformersEngine, expect: Expect, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = engine.model.generate
    sizes: list[int] = []

    def run_out(**inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**inputs)

    monkeypatch.setattr(engine.model, "generate", run_out)
    monkeypatch.setattr(engine.batcher, "max_batch_tokens", engine.batcher.max_batch_tokens)
    expected = {kind: expect(kind) for kind in ("base", "plain", "rslora")}
    assert ask(engine, *expected) == expected
    assert max(sizes) > 4


@pytest.mark.parametrize("kind", ["embed_tokens-lora", "lm_head-lora", "saved-lm_head", "tokens", "tying"])
def test_embeddings_that_are_the_head_too(
    tied_model: Path, tmp_path: Path, processor: Any, kind: str
) -> None:
    tying = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    adapter = build_adapter(tmp_path / "adapter", tied_model, **(KINDS | {"tying": tying})[kind])
    plain = answer_by_peft(tied_model, None, processor, ROWS)
    expected = answer_by_peft(tied_model, adapter, processor, ROWS)
    engine = TransformersEngine(load(tied_model), processor)
    before = state_of(engine.model)
    engine.load_adapter(kind, str(adapter))
    assert ask(engine, "base", kind) == {"base": plain, kind: expected}
    assert expected != plain
    assert is_as_before(engine.model, before)
    if kind == "tokens":
        merged = merge_adapter(str(tied_model), str(adapter), tmp_path / "merged")
        assert answer_by_peft(merged, None, processor, ROWS) == expected
    else:
        with pytest.raises(ValueError, match="ties its embeddings to its head, so that merging would"):
            merge_adapter(str(tied_model), str(adapter), tmp_path / "merged")


@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_is_the_same_or_refused(
    tiny_model: Path, folders: dict[str, Path], expect: Expect, processor: Any, tmp_path: Path, kind: str
) -> None:
    if kind == "lora_bias":  # layers without a bias of their own
        with pytest.raises(ValueError, match=r"cannot be merged: .*lora_bias.*; pass it as --adapter"):
            merge_adapter(str(tiny_model), str(folders[kind]), tmp_path / "merged")
        return
    merged = merge_adapter(str(tiny_model), str(folders[kind]), tmp_path / "merged")
    assert answer_by_peft(merged, None, processor, ROWS) == expect(kind)


def test_a_dropped_adapter_frees_its_memory(engine: TransformersEngine, folders: dict[str, Path]) -> None:
    parts: list[weakref.ref[Any]] = []
    kinds = ("excluded", "dora", "bias-all", "merger", "tokens", "embed_tokens-lora", "parameters")
    for kind in kinds:
        engine.load_adapter(kind, str(folders[kind]))
        parts += map(weakref.ref, engine._adapters[kind].parts.values())  # type: ignore[union-attr]
    texts(engine.generate([for_kind(ROWS[0], kind) for kind in kinds]))
    for kind in kinds:
        engine.unload_adapter(kind)
    assert len(parts) > 90
    assert not any(part() is not None for part in parts)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["plain", "bias-all", "merger", "tokens"])
def test_weights_that_are_no_numbers_are_refused(
    engine: TransformersEngine,
    folders: dict[str, Path],
    expect: Expect,
    tmp_path: Path,
    kind: str,
    value: float,
) -> None:
    broken = Path(shutil.copytree(folders[kind], tmp_path / "broken"))
    weights = load_file(broken / "adapter_model.safetensors")
    name = max(weights)
    weights[name].view(-1)[-1] = value
    save_file(weights, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds values that are not finite \(NaN or infinity\)") as caught:
        engine.load_adapter("broken", str(broken))
    assert f" {name} " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ask(engine, "base", "plain") == {"base": expect("base"), "plain": expect("plain")}


@pytest.mark.parametrize("kind", ["bias-all", "merger", "dora", "tokens", "embed_tokens-lora", "vision"])
def test_an_adapter_that_lacks_a_weight_leaves_no_trace(
    engine: TransformersEngine, folders: dict[str, Path], expect: Expect, tmp_path: Path, kind: str
) -> None:
    before = state_of(engine.model)
    short = Path(shutil.copytree(folders[kind], tmp_path / "short"))
    weights = load_file(short / "adapter_model.safetensors")
    own = {"merger": "merger.", "dora": "magnitude", "tokens": "trainable_tokens"}.get(kind, "lora_")
    del weights[next(name for name in weights if own in name)]
    save_file(weights, short / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"--adapter .*short") as caught:
        engine.load_adapter("short", str(short))
    assert "\n" not in str(caught.value)
    assert is_as_before(engine.model, before)
    assert ask(engine, "base", "plain") == {"base": expect("base"), "plain": expect("plain")}


REFUSED: dict[str, Any] = {
    "layer_replication": [[0, 2], [1, 2]],
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "megatron_config": {"a": 1},
    "velora_config": {"num_groups": 2},
    "monteclora_config": {"num_samples": 8},
    "kasa_config": {"beta": 1.0},
    "bias": "some",
    "task_type": "SEQ_CLS",
    "peft_type": "ADALORA",
    "of_the_future": True,
}
STARTS = ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica"]


@pytest.mark.parametrize(
    ("field", "value"), [*REFUSED.items(), *(("init_lora_weights", start) for start in STARTS)]
)
def test_what_is_not_known_is_refused_by_name(
    tiny_adapter: Path, tiny_model: Path, tmp_path: Path, field: str, value: Any
) -> None:
    adapter = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(
        ValueError, match=f"--adapter .*{value if isinstance(value, str) else field}"
    ) as caught:
        check_adapter_folder(str(adapter), str(tiny_model))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.visual.merger.mlp.0.weight",  # of modules_to_save, which the config lacks
        "base_model.model.model.visual.blocks.0.attn.qkv.bias",
        "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_magnitude_vector",
        "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_B.bias",
        "base_model.model.model.language_model.embed_tokens.token_adapter.trainable_tokens_delta",
        "base_model.model.model.language_model.layers.0.mlp.up_proj.ia3_l",
        "prompt_embeddings",
    ],
)
def test_a_tensor_that_the_config_does_not_speak_of_is_refused(
    tiny_adapter: Path, tiny_model: Path, tmp_path: Path, name: str
) -> None:
    adapter = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
    weights = load_file(adapter / "adapter_model.safetensors") | {name: torch.zeros(3)}
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"holds {name}, which is no part of the LoRA in"):
        check_adapter_folder(str(adapter), str(tiny_model))


def test_whatever_peft_writes_by_default_is_known() -> None:
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()
    assert tell_kind("x", config, ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]).mixes


def test_embeddings_that_were_saved_whole_take_effect_and_leave_the_base(
    tiny_model: Path, tmp_path: Path, processor: Any
) -> None:
    adapter = build_adapter(tmp_path / "whole", tiny_model)
    weights = load_file(adapter / "adapter_model.safetensors")
    for name in ("model.language_model.embed_tokens", "lm_head"):
        own = load_file(tiny_model / "model.safetensors")
        old = next(value for key, value in own.items() if key.endswith(f"{name.split('.')[-1]}.weight"))
        weights[f"base_model.model.{name}.weight"] = old + torch.randn_like(old) * old.std()
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    engine = TransformersEngine(load(tiny_model), processor)
    before = state_of(engine.model)
    engine.load_adapter("whole", str(adapter))
    expected = {
        "whole": answer_by_peft(tiny_model, adapter, processor, ROWS),
        "base": answer_by_peft(tiny_model, None, processor, ROWS),
    }
    assert ask(engine, "base", "whole") == expected
    assert expected["whole"] != expected["base"]
    assert is_as_before(engine.model, before)
