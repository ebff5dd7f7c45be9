"""Which adapters vLLM answers exactly: the others it would load without a word, or without a part of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vlmray.errors import OptionError
from vlmray.models.adapter_kinds import AdapterKind, tell_kind
from vlmray.models.checks import check_adapter_folder
from vlmray.models.lora import LANGUAGE_TARGETS, MERGER_TARGETS, VISION_TARGETS
from vlmray.models.source import ModelSource

_MORE = "is more than LoRA on linear layers, all that vLLM answers exactly"
_LAYER = re.compile(f"{LANGUAGE_TARGETS}|{VISION_TARGETS}|{MERGER_TARGETS}")
_ADAPTED_ENCODERS = ("Qwen2_5_VLForConditionalGeneration",)
"""Models of whose vision encoder the tests hold that vLLM adapts it as PEFT does."""

_PLAIN_ONLY = "use --engine transformers, or merge it into its base"


def check_adapter(adapter: str, model_id: str) -> None:
    """Refuse an adapter that vLLM would not answer as PEFT does.

    Raises:
        ValueError: It is more than LoRA on linear layers, or lacks weights.
        FileNotFoundError: The folder is not there or lacks files.
    """
    from vlmray.models.adapters import check_finite

    check_adapter_folder(adapter, model_id)
    check_kind(adapter, model_id)
    check_finite(adapter)
    names = set(_names(adapter))
    expected = _expected_names(adapter, model_id)
    if names != expected:
        missing, unknown = sorted(expected - names), sorted(names - expected)
        raise OptionError(
            "adapter",
            f"{adapter} does not fit the model: {len(unknown)} of its weights have no place "
            f"({', '.join(unknown[:1]) or 'none'}), {len(missing)} places got no weight "
            f"({', '.join(missing[:1]) or 'none'})",
            "train it again with the installed versions",
        )


def check_kind(adapter: str, model_id: str) -> None:
    """Refuse an adapter that is more than vLLM answers exactly; its weights are not read.

    Raises:
        ValueError: It is more than LoRA on linear layers, or on those of an encoder that vLLM does not adapt.
    """
    kind = _kind_of(adapter)
    if not kind.is_plain or not (kind.mixes or all(map(_LAYER.fullmatch, kind.layers))):
        raise OptionError("adapter", f"{adapter} {_MORE}", _PLAIN_ONLY)
    names = _architectures(model_id)
    if not kind.mixes and names and not {*names} & {*_ADAPTED_ENCODERS}:
        problem = f"{adapter} changes the vision encoder, and vLLM adapts that of {names[0]} not as PEFT does"
        raise OptionError("adapter", problem, _PLAIN_ONLY)


def changes_vision(adapter: str) -> bool:
    """Tell whether an adapter changes layers beside those of the language model."""
    return not _kind_of(adapter).mixes


def adapter_rank(adapter: str) -> int:
    """Return the largest rank of an adapter."""
    config = _read_config(adapter)
    return max(int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values()), 1)


def check_room(adapter: str, max_rank: int | None, *, adapts_vision: bool = False) -> None:
    """Refuse an adapter for which the engine was not started.

    Raises:
        ValueError: It takes no adapters, or only smaller ones, or none of the vision encoder.
    """
    if max_rank is not None and not adapts_vision and changes_vision(adapter):
        raise OptionError(
            "adapter",
            f"{adapter} changes the vision encoder, and no adapter did when vLLM was started",
            "pass --engine_options '{\"enable_tower_connector_lora\": true}'",
        )
    if max_rank is None:
        raise ValueError(
            "vLLM was started without room for adapters; name them, or --adapter_dir, at the start"
        )
    rank = adapter_rank(adapter)
    if rank > max_rank:
        raise OptionError(
            "adapter",
            f"{adapter} has rank {rank}, and vLLM was started for at most {max_rank}",
            f"pass --engine_options '{{\"max_lora_rank\": {rank}}}'",
        )


def changes_base(adapter: str) -> bool:
    """Tell whether an adapter adds anything; one that was never trained does not."""
    from safetensors import safe_open

    with safe_open(_weights(adapter), framework="pt") as weights:
        # No mapping, for all that it has keys.
        return any(
            bool(weights.get_tensor(name).any())
            for name in weights.keys()  # noqa: SIM118
            if name.endswith(".lora_B.weight")
        )


def _architectures(model_id: str) -> list[str]:
    """Return what a model says that it is; nothing where its config is not on this machine."""
    folder = ModelSource.find(model_id).folder
    if folder is None or not (folder / "config.json").is_file():
        return []
    return list(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [])


def _kind_of(adapter: str) -> AdapterKind:
    return tell_kind(adapter, _read_config(adapter), _names(adapter))


def _expected_names(adapter: str, model_id: str) -> set[str]:
    """Return the names of all weights that PEFT would look for; no memory is taken for any."""
    import torch
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(model_id))
        return set(get_peft_model_state_dict(get_peft_model(model, PeftConfig.from_pretrained(adapter))))


def _names(adapter: str) -> list[str]:
    from safetensors import safe_open

    with safe_open(_weights(adapter), framework="np") as weights:
        return list(weights.keys())


def _weights(adapter: str) -> Path:
    return Path(adapter).expanduser() / "adapter_model.safetensors"


def _read_config(adapter: str) -> dict[str, Any]:
    path = Path(adapter).expanduser() / "adapter_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config
