"""What can be told of the vLLM engine where vLLM is not installed."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.adapters import APART, build_adapter
from vlmray.config import EngineConfig
from vlmray.engines import build_engine
from vlmray.engines.vllm.adapters import (
    adapter_rank,
    changes_base,
    changes_vision,
    check_adapter,
    check_kind,
    check_room,
)
from vlmray.engines.vllm.options import engine_args
from vlmray.errors import OptionError

HERE: dict[str, Any] = {"on_gpu": False, "memory_fraction": 1.0, "max_adapters": 0, "max_rank": 0}
CARD = HERE | {"on_gpu": True}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_missing_vllm_is_named_with_the_command_that_installs_it() -> None:
    with pytest.raises(OptionError, match=r"^--engine vllm needs vLLM; pip install 'vlmray\[vllm\]'$"):
        build_engine(engine="vllm", model_id="builtin")


def test_options_are_passed_on_in_vllms_words() -> None:
    config = EngineConfig(
        engine="vllm", tensor_parallel_size=2, max_model_len=99, engine_options={"max_num_seqs": 7}
    )
    found = engine_args("model", config, **CARD)
    assert (found["tensor_parallel_size"], found["max_model_len"], found["max_num_seqs"]) == (2, 99, 7)
    assert found["distributed_executor_backend"] == "mp"
    assert (found["dtype"], engine_args("model", config, **HERE)["dtype"]) == ("auto", "float32")
    assert engine_args("model", config, **HERE, is_quantized=True)["dtype"] == "auto"
    assert "enable_lora" not in found
    found = engine_args("model", config, **CARD | {"max_adapters": 1, "adapts_vision": True})
    assert found["enable_tower_connector_lora"]


def test_replicas_that_share_a_card_share_its_memory() -> None:
    config = EngineConfig(engine="vllm", gpu_memory_utilization=0.8)
    whole, half = (
        engine_args("m", config, **CARD | {"memory_fraction": share})["gpu_memory_utilization"]
        for share in (1.0, 0.5)
    )
    assert (whole, half) == (0.8, 0.4)


@pytest.mark.parametrize(("rank", "room"), [(1, 1), (4, 8), (8, 8), (9, 16), (400, 512)])
def test_the_room_for_adapters_is_the_next_that_vllm_offers(rank: int, room: int) -> None:
    found = engine_args("m", EngineConfig(engine="vllm"), **HERE | {"max_adapters": 2, "max_rank": rank})
    assert (found["max_lora_rank"], found["max_loras"], found["enable_lora"]) == (room, 3, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_memory_utilization": 1.5}, "--gpu_memory_utilization must be above 0 and at most 1, got 1.5"),
        ({"tensor_parallel_size": 0}, "--tensor_parallel_size must be at least 1, got 0"),
        ({"max_batch_tokens": 9}, "--max_batch_tokens is for --engine transformers"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"^{message}"):
        EngineConfig(engine="vllm", **options)


def test_adapters_that_vllm_would_not_answer_exactly_are_refused(
    tmp_path: Path, tiny_model: Path, tiny_llava: Path
) -> None:
    plain = str(build_adapter(tmp_path / "plain", tiny_model))
    check_adapter(plain, str(tiny_model))
    assert changes_base(plain)
    assert not changes_vision(plain)
    for kind in ("dora", "patch_embed-lora", "bias-lora_only", "saved-lm_head", "tokens", "parameters"):
        adapter = build_adapter(tmp_path / kind, tiny_model, **APART[kind])
        with pytest.raises(OptionError, match="all that vLLM answers exactly; use --engine transformers"):
            check_kind(str(adapter), str(tiny_model))
    for kind in ("vision", "merger-lora"):
        adapter = build_adapter(tmp_path / kind, tiny_model, **APART[kind])
        check_adapter(str(adapter), str(tiny_model))
        assert changes_vision(str(adapter))
        with pytest.raises(OptionError, match=r"and vLLM adapts that of LlavaFor.* not as PEFT does; use"):
            check_kind(str(adapter), str(tiny_llava))


def test_an_adapter_that_lacks_weights_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = build_adapter(tmp_path / "adapter", tiny_model)
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(OptionError, match=r"0 of its weights have no place .*, 1 places got no weight"):
        check_adapter(str(adapter), str(tiny_model))


def test_an_adapter_above_the_room_is_refused_with_the_option_that_makes_it(
    tmp_path: Path, tiny_model: Path
) -> None:
    adapter = str(build_adapter(tmp_path / "adapter", tiny_model, rank_pattern={"q_proj": 24}))
    assert adapter_rank(adapter) == 24
    check_room(adapter, 32)
    vision = str(build_adapter(tmp_path / "vision", tiny_model, **APART["vision"]))
    check_room(vision, 8, adapts_vision=True)
    with pytest.raises(OptionError, match=r"changes the vision encoder, and no .*_lora\": true"):
        check_room(vision, 8)
    with pytest.raises(OptionError, match=r"has rank 24, and vLLM was started for at most 16; .*lora_rank"):
        check_room(adapter, 16)
    with pytest.raises(ValueError, match="without room for adapters"):
        check_room(adapter, None)


STARTER = """
import subprocess, sys
from vlmray.engines.vllm.guard import ProcessGuard
guard = ProcessGuard()
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
print(child.pid, flush=True)
input()
guard.close()
print(child.wait(), flush=True)
"""


@pytest.mark.parametrize("how", ["killed", "closed"])
def test_nothing_outlives_who_started_it(how: str) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert starter.stdin is not None
    assert starter.stdout is not None
    child = int(starter.stdout.readline())
    os.kill(child, 0)
    if how == "closed":
        starter.stdin.write("\n")
        starter.stdin.flush()
        assert int(starter.stdout.readline()) == -signal.SIGKILL
    else:
        starter.kill()
    starter.wait()
    deadline = time.monotonic() + 20
    while _is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _is_running(pid: int) -> bool:
    try:
        return " Z" not in Path(f"/proc/{pid}/stat").read_text()[:40]
    except OSError:
        return False
