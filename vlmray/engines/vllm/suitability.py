"""What vLLM is not chosen for by itself: what it refuses, cannot read, or was never told of at its start."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from vlmray.config import EngineConfig
from vlmray.engines.vllm.adapters import adapter_rank, check_kind
from vlmray.engines.vllm.options import MOST_RANK
from vlmray.errors import OptionError, one_line
from vlmray.models.source import resolve_model_id

_HOTTEST = 2.0
"""Temperature above which vLLM fails a row."""


def find_objection(config: EngineConfig, model_ids: Sequence[str], adapters: Sequence[str]) -> str | None:
    """Tell why vLLM is not the engine for some options and adapters; None where it is."""
    gpus = getattr(config, "gpus_per_replica", None)
    if gpus is not None and (gpus == 0 or gpus > 1):
        return f"--gpus_per_replica {gpus:g}; it is spread over GPUs by --tensor_parallel_size"
    if getattr(config, "temperature", 0.0) > _HOTTEST:
        return f"its temperatures end at {_HOTTEST:g}"
    if getattr(config, "adapter_dir", None):
        return "--adapter_dir may get adapters of any kind and rank, and it has to know them at its start"
    try:
        for adapter in adapters:
            for model_id in model_ids:
                _check_adapter(adapter, model_id)
    except OptionError as error:
        return f"--{error.option} {error.problem}"
    return None


def _check_adapter(adapter: str, model_id: str) -> None:
    if "://" in adapter:
        raise OptionError("adapters", f"has {adapter}, of which it has to know the rank at its start")
    check_kind(adapter, model_id)
    if (rank := adapter_rank(adapter)) > MOST_RANK:
        raise OptionError("adapter", f"{adapter} has rank {rank}, above {MOST_RANK}")


def find_model_objection(config: EngineConfig, model_id: str) -> str | None:
    """Tell why vLLM is not the engine for a model; None where it is. Imports vLLM."""
    from transformers import PreTrainedConfig

    from vlmray.engines.vllm.sampling import read_settings

    path = resolve_model_id(model_id)
    try:
        read_settings(path, trust_remote_code=config.trust_remote_code)
        found, _ = PreTrainedConfig.get_config_dict(path)
    except OptionError as error:
        return error.problem
    except OSError as error:
        return one_line(error)
    return _find_architecture_objection(found)


def _find_architecture_objection(config: dict[str, Any]) -> str | None:
    """Ask vLLM whether it has code for a model, and for how its weights are stored."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
        from vllm.model_executor.models import ModelRegistry
    except Exception as error:  # what it finds missing on a machine is of any kind
        return f"it cannot be imported here ({one_line(error)})"
    names = config.get("architectures") or ()
    if not {*names} & {*ModelRegistry.get_supported_archs()}:
        return f"it does not know the architecture {' or '.join(names) or '(none)'}"
    method = _method_of(config)
    if method is not None and method not in QUANTIZATION_METHODS:
        return f"it does not read weights quantized by {method}"
    return None


def quantization_of(model_id: str) -> str | None:
    """Return how the weights of a checkpoint are quantized; None where they are not."""
    from transformers import PreTrainedConfig

    found, _ = PreTrainedConfig.get_config_dict(model_id)
    return _method_of(found)


def _method_of(config: dict[str, Any]) -> str | None:
    method: str | None = (config.get("quantization_config") or {}).get("quant_method")
    return method
