"""What an adapter does to a model, told by its config and the names of its tensors. Standard library only.

An allow-list: what is not named here is refused, for PEFT would load much of it without a word and answer
with a changed base, or without the part that it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmray.errors import OptionError

_ANY_VALUE = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config",
    "megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "target_parameters", "trainable_token_indices", "use_dora",
    "use_rslora",
})  # fmt: skip
"""Fields that say how an adapter was made, or what the code below knows."""

_VALUES: dict[str, tuple[Any, ...]] = {
    "bias": ("none", "all", "lora_only"),
    # The others take something out of the base's weights, and what is left must be under the adapter again.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"),
}

_SUPPORTED = "LoRA, rsLoRA and DoRA are, with bias, modules_to_save and trainable_token_indices"
_HINTS = {"init_lora_weights": "save it as plain LoRA, as PEFT converts it where it can"}

_NEEDS_TURNS = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters",
    "ensure_weight_tying",
)  # fmt: skip

_PREFIX = "base_model.model."
_PLAIN = re.compile(r"(.+)\.lora_[AB]\.weight")
_OF_EMBEDDINGS = re.compile(r".+\.lora_embedding_[AB]")
_WHOLE_EMBEDDINGS = re.compile(r"(?:.+\.)?(?:embed_tokens|lm_head)(?:\.base_layer)?\.weight")
_OF_PEFT = re.compile(r"(?:^|\.)(?:original_module|modules_to_save)\.")

# Of others the inputs need not be rows: a vision tower gets patches, an expert the tokens routed to it.
_LAYER_OF_ROWS = re.compile(
    r"(?:(?:model\.)?(?:(?:language_model|text_model)\.)?(?:(?:model|decoder)\.)*layers\.\d+"
    r"\.(?:\w*attn|attention|mlp|ffn|feed_forward)\.(?:\w*proj\w*|fc\d|w\d)|(?:language_model\.)?lm_head)"
)


@dataclass(frozen=True, slots=True)
class AdapterKind:
    """What an adapter does to its base."""

    mixes: bool
    """Whether what it has beside `replaced` is only added to rows, so that rows of others and of the base may
    share a forward pass."""

    layers: frozenset[str]
    """Names of the layers of the base beside which it has plain LoRA matrices."""

    is_plain: bool
    """Whether it has nothing else, and nothing that is computed otherwise."""

    replaced: frozenset[str]
    """Names of parameters of the base in whose place it has others of its own."""


def tell_kind(adapter: str, config: Mapping[str, Any], names: Iterable[str]) -> AdapterKind:
    """Tell what an adapter does to its base, and refuse what is not known to be answered exactly.

    Args:
        adapter: As the user gave it.
        config: Content of its `adapter_config.json`.
        names: Of the tensors in its `adapter_model.safetensors`.

    Raises:
        ValueError: A field with a value, or a tensor, that is not known.
    """
    _check_fields(adapter, config)
    names = list(names)
    replaced = {name for name in names if _replaces(name, config)}
    added = [name for name in names if _adds(name, config)]
    unknown = sorted(set(names) - replaced - set(added))
    if not added:
        raise OptionError("adapter", f"{adapter}: it holds no LoRA weights")
    if unknown:
        raise OptionError(
            "adapter",
            f"{adapter} holds {unknown[0]}, which is no part of the LoRA in its adapter_config.json",
            "train it without bias=all, or save it again with PEFT's save_pretrained",
        )
    plain = [_PLAIN.fullmatch(name.removeprefix(_PREFIX)) for name in added]
    layers = {match[1] for match in plain if match}
    is_plain = all(plain) and not any(config.get(field) for field in _NEEDS_TURNS)
    return AdapterKind(
        mixes=is_plain and all(map(_LAYER_OF_ROWS.fullmatch, layers)),
        layers=frozenset(layers),
        is_plain=is_plain and not replaced,
        replaced=frozenset(name.removeprefix(_PREFIX).replace(".base_layer.", ".") for name in replaced),
    )


def _check_fields(adapter: str, config: Mapping[str, Any]) -> None:
    for field, value in config.items():
        if value in _VALUES[field] if field in _VALUES else field in _ANY_VALUE or not value:
            continue
        problem = f"{adapter}: {field} is {value} in adapter_config.json, which is not supported"
        raise OptionError("adapter", problem, _HINTS.get(field, _SUPPORTED))


def _adds(name: str, config: Mapping[str, Any]) -> bool:
    """Tell whether a tensor is of a part that PEFT puts beside, or around, the base's own."""
    saved = config.get("modules_to_save") or ()
    return bool(
        _PLAIN.fullmatch(name)
        or _OF_EMBEDDINGS.fullmatch(name)
        or (config.get("lora_bias") and name.endswith(".lora_B.bias"))
        or (config.get("use_dora") and re.search(r"\.lora_magnitude_vector(?:\.weight)?$", name))
        or (config.get("trainable_token_indices") and name.endswith(".token_adapter.trainable_tokens_delta"))
        or (any(f"{module}." in name for module in saved) and not _OF_PEFT.search(name))
    )


def _replaces(name: str, config: Mapping[str, Any]) -> bool:
    """Tell whether a tensor goes into the place of one of the base's: a bias, or embeddings saved whole."""
    if _adds(name, config) or _OF_PEFT.search(name):
        return False
    is_bias = config.get("bias", "none") != "none" and name.endswith(".bias")
    return is_bias or bool(_WHOLE_EMBEDDINGS.fullmatch(name))
