"""What the engine knows of memory."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLConfig

from vlmray.engines.memory import (
    CPU_BATCH_TOKENS,
    bytes_per_token,
    cached_share,
    find_batch_tokens,
    is_out_of_memory,
)


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
from vlmray.engines.memory import keep_freed_memory

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
