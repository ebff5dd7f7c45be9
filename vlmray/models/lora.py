"""LoRA adapters: which modules they change, and what of a model is trained.

* `get_default_lora_config_for_qwen_vl` names the modules, `find_lora_targets` looks them up in a model.
  On the weightless model of `build_skeleton` that takes a second, so a pattern that fits nothing ends a
  job before any weight is read.
* `freeze_vision` and `count_parameters` say what of a model is trained.

Module names are those of transformers 5, where most families share a layout: `model.language_model`, an
encoder (`visual`, `vision_tower`, `vision_model`) and a part between them (`visual.merger`,
`multi_modal_projector`, `connector`). The patterns cover attention and MLP projections of that layout.
Experts that a mixture model keeps as one fused parameter are not modules and are not adapted. A family
with other names gets an error that lists its layers, to be chosen from with `--lora_target_modules`.

torch, transformers and peft are imported inside the functions: peft alone takes seconds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vlmray.errors import OptionError
from vlmray.models.families import ANY, family_of
from vlmray.models.families.base import Family
from vlmray.models.merging import load_base_config

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

# PEFT matches a string against the whole module name. Bare suffixes such as gate_proj would also hit the
# vision tower of Qwen2.5-VL (peft#2615), so each pattern spells the way from the top of the model.
_BLOCK = r"(?:\w*attn|attention|mlp|ffn|feed_forward)"
_TOWER = r"(?:visual|vision_encoder|(?:vision|image|video)_tower|\w*vision_model)"

LANGUAGE_TARGETS = (
    r"(?:(?:model\.)?(?:language_model|text_model)(?:\.(?:model|encoder|decoder))*|model)\.layers\.\d+"
    rf"\.(?:{_BLOCK}\.)?(?:shared_experts?\.)?"
    r"(?:[qkvo]_proj|qkv_proj|out_proj|q_[ab]_proj|kv_a_proj_with_mqa|kv_b_proj|in_proj_(?:qkv|z)"
    r"|(?:gate|up|down|gate_up)_proj|fc[12]|w[123])"
)
"""Attention and MLP projections of the language model."""

VISION_TARGETS = (
    rf"(?:model\.)?{_TOWER}(?:\.(?:model|vision_model|vision_encoder|encoder|(?:global_)?transformer))*"
    rf"\.(?:blocks|layers?)\.\d+\.{_BLOCK}"
    r"\.(?:qkv|[qkv]|[qkvo]_proj|out_proj|proj|projection|projection_layer"
    r"|(?:gate|up|down)_proj|(?:linear_)?fc[12]|lin[12])"
)
"""Attention and MLP projections of the vision encoder's blocks."""

MERGER_TARGETS = (
    rf"(?:model\.)?(?:{_TOWER}\.\w*merger\w*(?:\.\d+)?\.mlp\.[02]|projector\.readout\.[02]"
    rf"|(?:{_TOWER}\.(?:\w*merger\w*|vision_adapter)|multi_modal_projector|mm_projector|projector|connector"
    r"|aligner|merger|vision_projection|vision_adapter)(?:\.\w+)*"
    r"\.(?:linear(?:_fc)?_?\d?|fc[12]|(?:\w+_)?proj|multimodal_projector|merging_layer))"
)
"""Linear layers between vision encoder and language model."""

_PARTS = {
    "language": (LANGUAGE_TARGETS, "an attention or MLP projection of the language model"),
    "vision": (VISION_TARGETS, "an attention or MLP projection of the vision encoder (--lora_vision)"),
    "merger": (MERGER_TARGETS, "a linear layer between vision encoder and language model (--lora_merger)"),
}
"""What can be adapted by an option: where it is in most families, and what it is."""

_MAX_LISTED = 8
_PATH_SEGMENT_WITH_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_IN_VISION_ENCODER = re.compile(rf"(?:^|.*\.){_TOWER}\.(?!.*(?:merger|vision_adapter)).+")


def get_default_lora_config_for_qwen_vl(
    *,
    r: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.05,
    target_modules: str | None = None,
    lora_vision: bool = False,
    lora_merger: bool = False,
    family: Family = ANY,
) -> LoraConfig:
    """Make the LoRA configuration: by default the language model's projections and nothing of the vision.

    Made for Qwen2.5-VL; the patterns fit most families of transformers 5 (see `find_lora_targets`).

    Args:
        r: Rank.
        lora_alpha: The update is scaled by `lora_alpha / r`.
        lora_dropout: Of the inputs of the adapter while training.
        target_modules: Instead of the default either suffixes with commas between them (`q_proj,v_proj`),
            which PEFT finds in every part of the model, or one regex for whole module names.
        lora_vision: Adapt the vision encoder's blocks too.
        lora_merger: Adapt the linear layers between vision encoder and language model too.
        family: What is known of the model.

    Raises:
        ValueError: `target_modules` beside `lora_vision` or `lora_merger`, empty, or no regex.
    """
    from peft import LoraConfig

    if target_modules is not None and (lora_vision or lora_merger):
        raise OptionError(
            "lora_target_modules",
            f"{target_modules} says which modules are adapted, and so do --lora_vision and --lora_merger",
            "pass one or the other",
        )
    wanted = {"language": True, "vision": lora_vision, "merger": lora_merger}
    parts = [pattern for part, (pattern, _) in _parts_of(family).items() if wanted[part]]
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules="|".join(parts) if target_modules is None else _parse_targets(target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )


def find_lora_targets(model: Any, lora_config: LoraConfig) -> list[str]:
    """Return the names of the modules that PEFT would adapt, in the model's order.

    Args:
        model: The base, not yet wrapped by PEFT; the weightless one of `build_skeleton` will do.
        lora_config: What to look for.

    Raises:
        ValueError: A pattern or suffix that matches nothing, a match that is no linear layer, or the
            output head. The message names the layers that are there.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    modules = dict(model.named_modules())
    names = [name for name in modules if name and check_target_module_exists(lora_config, name)]
    for pattern, what in _each_target(lora_config, family_of(model.config)).items():
        if not any(re.fullmatch(pattern, name) for name in names):
            raise ValueError(
                f"no module of {type(model).__name__} {what}; its linear layers: "
                f"{_describe_linear_layers(model)}; pass the ones to adapt as --lora_target_modules, "
                "suffixes (q_proj,v_proj) or a regex"
            )
    for name in names:
        _check_adaptable(model, name, modules[name])
    return names


def abbreviate_names(names: Iterable[str]) -> list[str]:
    """Summarise module names by pattern: `layers.*.mlp.up_proj (28x)` for those of 28 layers."""
    counts = Counter(_PATH_SEGMENT_WITH_NUMBER.sub(".*", name) for name in names)
    return [f"{pattern} ({count}x)" for pattern, count in counts.items()]


def build_skeleton(model_id: str, *, trust_remote_code: bool = False) -> Any:
    """Build a model without weights, on the meta device, from a checkpoint's config alone.

    It takes a second and no memory, whatever the size, and has the module names of the loaded model.

    Args:
        model_id: Local checkpoint folder, cached hub id, or reachable hub id.
        trust_remote_code: Run model code that comes with the checkpoint.

    Raises:
        ValueError: Not reachable, or not a decoder-only image-text-to-text model.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    config = load_base_config(model_id, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)


def freeze_vision(model: Any) -> int:
    """Exclude the vision encoder from training, but not the merger or projector behind it.

    Args:
        model: A base model, or one wrapped by PEFT, whose adapters inside the encoder are frozen too.

    Returns:
        How many parameters are frozen.

    Raises:
        ValueError: The model has no part with a vision encoder's name.
    """
    frozen = 0
    for name, parameter in model.named_parameters():
        if _IN_VISION_ENCODER.fullmatch(name):
            parameter.requires_grad_(False)
            frozen += _number_of_values(parameter)
    if not frozen:
        raise ValueError(
            f"no vision encoder in {type(model).__name__}: no part is called visual, vision_tower, "
            "vision_model, vision_encoder, image_tower or video_tower; its linear layers: "
            f"{_describe_linear_layers(model)}; train it without freezing, or with LoRA"
        )
    return frozen


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Return how many parameters are trained, and how many there are; 4-bit ones by their real number."""
    trainable, total = 0, 0
    for parameter in model.parameters():
        values = _number_of_values(parameter)
        total += values
        trainable += values * parameter.requires_grad
    return trainable, total


def _parse_targets(text: str) -> str | list[str]:
    """Read `--lora_target_modules`: names with commas between them, or else one regex."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise OptionError("lora_target_modules", "is empty", "pass suffixes (q_proj,v_proj) or a regex")
    if names == ["all-linear"]:
        raise OptionError(
            "lora_target_modules",
            "all-linear would adapt whatever is linear in any part of the model",
            "pass --lora_vision and --lora_merger instead, or a regex",
        )
    if all(re.fullmatch(r"[\w.]+", name) for name in names):
        return names
    try:
        re.compile(text)
    except re.error as error:
        raise OptionError(
            "lora_target_modules", f"{text!r} is neither names with commas between them nor a regex ({error})"
        ) from error
    return text


def _parts_of(family: Family) -> dict[str, tuple[str, str]]:
    """Return the pattern of each part of a model, and what the part is."""
    return {part: (family.lora.get(part, pattern), what) for part, (pattern, what) in _PARTS.items()}


def _each_target(lora_config: LoraConfig, family: Family) -> dict[str, str]:
    """Return the patterns of which each has to match something, and in words what a match is."""
    targets = lora_config.target_modules
    if not isinstance(targets, str):
        names = sorted(targets or [])
        return {rf"(?:.*\.)?{re.escape(name)}": f"matches the LoRA target {name!r}" for name in names}
    known = {**dict(_PARTS.values()), **dict(_parts_of(family).values())}
    parts = [pattern for pattern in known if pattern in targets]
    if "|".join(parts) != targets:
        return {targets: f"matches the LoRA target {targets!r}"}  # not the default
    return {pattern: f"is {known[pattern]}" for pattern in parts}


def _check_adaptable(model: Any, name: str, module: Any) -> None:
    """Refuse a target that an adapter cannot change, or changes without effect.

    PEFT also adapts embeddings and convolutions; their weights have shapes that the check of an adapter
    against its base (`check_adapter_folder`) cannot compare, and a vision patch embedding is seldom meant.
    """
    if "lm_head" in name.split(".") or module is model.get_output_embeddings():
        raise ValueError(
            f"LoRA target {name} is the output head of {type(model).__name__}; TRL's fused loss reads its "
            "weight and not the adapter, so that one would not be trained; leave it out of "
            "--lora_target_modules"
        )
    if not _is_linear(module):
        raise ValueError(
            f"LoRA target {name} of {type(model).__name__} is a {type(module).__name__}, expected a linear "
            f"layer; these are: {_describe_linear_layers(model)}; make --lora_target_modules match only such"
        )


def _is_linear(module: Any) -> bool:
    """Tell whether LoRA takes effect in a module as in a linear layer; quantised ones are subclasses."""
    import torch
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
    from transformers.pytorch_utils import Conv1D

    # The output projection of torch's MultiheadAttention is never called, only its weight is read.
    return isinstance(module, (torch.nn.Linear, Conv1D)) and not isinstance(
        module, NonDynamicallyQuantizableLinear
    )


def _describe_linear_layers(model: Any) -> str:
    """List a model's linear layers by pattern, those with most weights first; the output head left out."""
    sizes: Counter[str] = Counter()
    names = []
    for name, module in model.named_modules():
        if _is_linear(module) and module is not model.get_output_embeddings():
            names.append(name)
            sizes[_PATH_SEGMENT_WITH_NUMBER.sub(".*", name)] += module.weight.numel()
    patterns = sorted(abbreviate_names(names), key=lambda line: -sizes[line.rpartition(" ")[0]])
    more = f", and {len(patterns) - _MAX_LISTED} more" if len(patterns) > _MAX_LISTED else ""
    return ", ".join(patterns[:_MAX_LISTED]) + more if patterns else "none"


def _number_of_values(parameter: Any) -> int:
    """Count a parameter's values; bitsandbytes packs two 4-bit ones into each byte of its storage."""
    packed = type(parameter).__name__ == "Params4bit"
    return parameter.numel() * (2 * parameter.element_size() if packed else 1)
