"""What the engine knows of memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Qwen2_5_VLConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MODEL_TYPES

from vlmray.engines import build_engine
from vlmray.engines.transformers import engine as module
from vlmray.engines.transformers.memory import (
    CPU_BATCH_TOKENS,
    bytes_per_token,
    cached_share,
    find_batch_tokens,
    is_out_of_memory,
    limit_memory,
)
from vlmray.models.checks import REFUSED_TYPES, check_model_kind
from vlmray.models.loading import load_checkpoint

GB = 2**30


def make_model(device: str) -> Any:
    """A stand-in for a model of 7 billion parameters in bfloat16."""
    text = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4,
    }  # fmt: skip
    vision = {"hidden_size": 1280, "intermediate_size": 3420}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return SimpleNamespace(config=config, dtype=torch.bfloat16, device=torch.device(device))


def test_a_gpu_gets_the_batch_that_its_free_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("cuda")
    per_token = bytes_per_token(model.config, 2)
    assert per_token > 2 * 28 * 4 * 128 * 2  # more than keys and values
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**30)
    for free in (8 * 2**30, 60 * 2**30):
        left = free - 2 * 2**30  # torch holds two more for what comes
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, left=left: (left, 80 * 2**30))
        assert 0.7 * free < find_batch_tokens(model) * per_token < free


def test_replicas_that_share_a_card_plan_no_more_than_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("cuda")
    per_token = bytes_per_token(model.config, 2)
    weights, card = 15 * GB, 80 * GB
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: weights + GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: weights)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (card - weights - GB, card))
    alone = find_batch_tokens(model) * per_token
    assert alone < card - weights < 1.5 * alone
    for num_replicas in (2, 4):  # the first of them, as if it had the card to itself
        planned = weights + find_batch_tokens(model, 1 / num_replicas) * per_token
        assert 0.8 * card < num_replicas * planned < card
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * GB, card))  # others took the rest
    assert find_batch_tokens(model, 0.5) * per_token < 3 * GB
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: card)
    assert find_batch_tokens(model, 0.5) == 1


def test_a_share_of_a_card_is_set_before_the_model_loads(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    load = load_checkpoint
    happened: list[Any] = []

    def load_and_note(*args: Any, **kwargs: Any) -> Any:
        happened.append("load")
        return load(*args, **kwargs)

    monkeypatch.setattr(module, "limit_memory", happened.append)
    monkeypatch.setattr(module, "load_checkpoint", load_and_note)
    monkeypatch.setattr(module, "find_batch_tokens", lambda model, fraction: happened.append(fraction) or 77)
    engine: Any = build_engine(engine="transformers", model_id=str(tiny_model), memory_fraction=0.25)
    assert happened == [0.25, "load", 0.25]
    assert engine.batcher.max_batch_tokens == 77


@pytest.mark.parametrize(
    ("fraction", "has_gpu", "expected"), [(0.5, True, [0.5]), (1.0, True, []), (0.5, False, [])]
)
def test_only_a_share_of_a_card_is_a_limit(
    monkeypatch: pytest.MonkeyPatch, fraction: float, has_gpu: bool, expected: list[float]
) -> None:
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    limit_memory(fraction)
    assert limits == expected


@pytest.mark.parametrize("model_type", sorted(MODEL_TYPES))
def test_every_config_has_a_plausible_estimate_or_is_refused_by_name(model_type: str) -> None:
    if model_type in REFUSED_TYPES:
        with pytest.raises(ValueError, match=f"^--model_id X: {model_type} is an? .*; vlmray runs") as caught:
            check_model_kind("X", {"model_type": model_type})
        assert "\n" not in str(caught.value)
        return
    try:
        config = AutoConfig.for_model(model_type)
    except ImportError as error:
        pytest.skip(f"{model_type} cannot be built here: {error}")
    check_model_kind("X", config.to_dict())
    text = config.get_text_config()
    num_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = text.to_dict().get("head_dim") or text.hidden_size // text.num_attention_heads
    keys_and_values = 2 * 2 * text.num_hidden_layers * num_heads * head_dim
    assert 0 < keys_and_values < bytes_per_token(config, 2) < 100e6
    assert keys_and_values <= round(cached_share(config) * bytes_per_token(config, 2))
    assert cached_share(config) < 1


def test_sizes_are_found_wherever_a_config_has_them() -> None:
    config = make_model("cpu").config
    text, vision = config.get_text_config(), config.vision_config.to_dict()

    def estimate(text: Any, vision: Any) -> int:
        return bytes_per_token(SimpleNamespace(get_text_config=lambda: text, vision_config=vision), 2)

    expected = bytes_per_token(config, 2)
    assert estimate(text, vision) == expected
    assert estimate(text, {"encoder": vision, "width": None}) == expected
    by_layer = {**text.to_dict(), "intermediate_size": [64, text.intermediate_size, 32]}
    assert estimate(by_layer, vision) == expected
    text_alone = bytes_per_token(SimpleNamespace(get_text_config=lambda: text), 2)
    assert text_alone == estimate(text, None) == estimate(text, {"architecture": "resnet50"}) < expected


def test_a_config_that_tells_nothing_gets_a_fixed_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("cuda")
    model.config = SimpleNamespace(get_text_config=dict)
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GB, GB))
    assert find_batch_tokens(model) == CPU_BATCH_TOKENS


def test_a_copy_takes_less_than_a_token() -> None:
    config = make_model("cuda").config
    assert cached_share(config) * bytes_per_token(config, 2) == pytest.approx(2 * 28 * 4 * 128 * 2)
    assert 0 < cached_share(config) < 0.5


def test_a_cpu_gets_a_fixed_one() -> None:
    assert find_batch_tokens(make_model("cpu")) == CPU_BATCH_TOKENS


@pytest.mark.skipif(sys.platform != "linux", reason="about glibc")
def test_freed_memory_is_kept() -> None:
    code = """
import resource
import torch
from vlmray.engines.transformers.memory import keep_freed_memory

def count_faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(8_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = count_faults()
keep_freed_memory()
torch.ones(8_000_000)
print(before, count_faults())
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after = map(int, output.split())
    assert after < before / 20


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_failures(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
