"""LoRA adapters: which modules they change, what is trained, and how one becomes plain weights.

* `get_default_lora_config_for_qwen_vl` names the modules, `find_lora_targets` looks them up in a model.
  On the weightless model of `build_skeleton` that takes a second, so a pattern that fits nothing ends a
  job before any weight is read.
* `freeze_vision` and `count_parameters` say what of a model is trained.
* `merge_adapter` writes base and adapter as one checkpoint.

Module names are those of transformers 5, where most families share a layout: `model.language_model`, an
encoder (`visual`, `vision_tower`, `vision_model`) and a part between them (`visual.merger`,
`multi_modal_projector`, `connector`). The patterns cover attention and MLP projections of that layout.
Experts that a mixture model keeps as one fused parameter are not modules and are not adapted. A family
with other names gets an error that lists its layers, to be chosen from with `--lora_target_modules`.

torch, transformers and peft are imported inside the functions: peft alone takes seconds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmray.models.checks import local_folder
from vlmray.storage import hub

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

_PARTS = {LANGUAGE_TARGETS: "", VISION_TARGETS: " (--lora_vision)", MERGER_TARGETS: " (--lora_merger)"}
_MAX_LISTED = 8
_PATH_SEGMENT_WITH_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_IN_VISION_ENCODER = re.compile(rf"(?:^|.*\.){_TOWER}\.(?!.*(?:merger|vision_adapter)).+")

_SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")
"""What lies beside a checkpoint's weights: processor, tokenizer, chat template, generation, code."""


def get_default_lora_config_for_qwen_vl(
    *,
    r: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.05,
    target_modules: str | None = None,
    lora_vision: bool = False,
    lora_merger: bool = False,
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

    Raises:
        ValueError: `target_modules` beside `lora_vision` or `lora_merger`, empty, or no regex.
    """
    from peft import LoraConfig

    if target_modules is not None and (lora_vision or lora_merger):
        raise ValueError(
            f"--lora_target_modules {target_modules} says which modules are adapted, and so do --lora_vision "
            "and --lora_merger; pass one or the other"
        )
    parts = [LANGUAGE_TARGETS] + [VISION_TARGETS] * lora_vision + [MERGER_TARGETS] * lora_merger
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
    for target, pattern in _each_target(lora_config).items():
        if not any(re.fullmatch(pattern, name) for name in names):
            raise ValueError(
                f"no module of {type(model).__name__} matches the LoRA target {target!r}"
                f"{_PARTS.get(target, '')}; its linear layers: {_describe_linear_layers(model)}; pass the "
                "ones to adapt as --lora_target_modules, suffixes (q_proj,v_proj) or a regex"
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

    config = _load_config(model_id, trust_remote_code=trust_remote_code)
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


def merge_adapter(
    model_id: str,
    adapter: str,
    folder: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write a base model with an adapter merged into it, as a checkpoint that needs no PEFT.

    The base is loaded unquantised: merged into 4-bit weights an adapter gives other answers than beside
    them (peft#2586). An adapter that was trained on a quantised base has only ever seen that one, and in
    bfloat16 the sum is rounded: score the merged model again. The folder appears once it is complete.

    Args:
        model_id: Local checkpoint folder or hub id of the base.
        adapter: Folder of the LoRA adapter.
        folder: Where to write; must be missing or empty.
        dtype: Of the merged weights; `auto` is the base checkpoint's own, on a CPU too.
        min_pixels: Smallest image area to write into the processor's config; None keeps the base's.
        max_pixels: Largest image area to write into the processor's config; None keeps the base's.
        trust_remote_code: Run model code that comes with the checkpoint.

    Returns:
        The folder: weights in safetensors under the base's names, config, and the base's own generation
        config, processor, tokenizer and chat template files.

    Raises:
        FileExistsError: `folder` holds something.
        ValueError: A quantised base, an adapter of another base, or one with weights that are not numbers.
    """
    from vlmray.models.loading import load_qwen_vl_model_and_processor

    target = Path(folder).expanduser()
    _check_new_folder(target)
    config = _load_config(model_id, trust_remote_code=trust_remote_code)
    _check_not_quantized(model_id, config)
    model, processor = load_qwen_vl_model_and_processor(
        model_id,
        adapter=adapter,
        dtype=_dtype_name(config) if dtype == "auto" else dtype,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        trust_remote_code=trust_remote_code,
    )
    merged = model.merge_and_unload(safe_merge=True)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an earlier attempt
    partial.mkdir(parents=True)
    _write_checkpoint(merged, _side_files(model_id), partial)
    copy_side_files(model_id, partial, processor if min_pixels or max_pixels else None)
    partial.replace(target)
    return target


def _parse_targets(text: str) -> str | list[str]:
    """Read `--lora_target_modules`: names with commas between them, or else one regex."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError("--lora_target_modules is empty; pass suffixes (q_proj,v_proj) or a regex")
    if names == ["all-linear"]:
        raise ValueError(
            "--lora_target_modules all-linear would adapt whatever is linear in any part of the model; pass "
            "--lora_vision and --lora_merger instead, or a regex"
        )
    if all(re.fullmatch(r"[\w.]+", name) for name in names):
        return names
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(
            f"--lora_target_modules {text!r} is neither names with commas between them nor a regex ({error})"
        ) from error
    return text


def _each_target(lora_config: LoraConfig) -> dict[str, str]:
    """Return the patterns or suffixes of which each has to match something, with the regex of each."""
    targets = lora_config.target_modules
    if not isinstance(targets, str):
        return {suffix: rf"(?:.*\.)?{re.escape(suffix)}" for suffix in sorted(targets or [])}
    parts = [part for part in _PARTS if part in targets]
    if "|".join(parts) != targets:
        parts = [targets]  # not the default
    return {part: part for part in parts}


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


def _load_config(model_id: str, *, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    from vlmray.models.loading import check_model_type

    folder = local_folder(model_id)
    if folder is None:
        hub.check_reachable(model_id, "model", option="--model_id")  # once; loading would retry for long
    check_model_type(model_id, trust_remote_code=trust_remote_code)
    return AutoConfig.from_pretrained(str(folder or model_id), trust_remote_code=trust_remote_code)


def _check_new_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an empty folder; pass a new one for the merged model")


def _check_not_quantized(model_id: str, config: Any) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(
            f"--model_id {model_id} is a quantised checkpoint ({method}); an adapter merges well only into "
            "full weights: pass the checkpoint that it was made from"
        )


def _dtype_name(config: Any) -> str:
    """Return the dtype that a checkpoint's config gives, or `auto` for what loading makes of none."""
    dtype = getattr(config, "dtype", None)
    return "auto" if dtype is None else str(dtype).removeprefix("torch.")


def copy_side_files(model_id: str, folder: Path, processor: Any = None) -> None:
    """Copy what lies beside a base's weights: processor, tokenizer, chat template, generation config.

    `processor.save_pretrained` would not do: it leaves out preprocessor_config.json, which other programs
    read and without which AutoProcessor fails where torchvision is missing, and the video part there.

    Args:
        model_id: Local checkpoint folder or hub id of the base.
        folder: Where to; files of the same names are replaced.
        processor: Its image sizes are written into the copies; None keeps the base's.
    """
    for path in _side_files(model_id):
        shutil.copyfile(path, folder / path.name)
    if processor is not None:
        _write_pixel_limits(folder, processor.image_processor.size)


def _side_files(model_id: str) -> list[Path]:
    """Return the files beside the base's weights; of a hub model all of them, not only those loaded here."""
    folder = Path(model_id).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model_id, allow_patterns=list(_SIDE_FILES)))  # the cache if offline
    files = [path for pattern in _SIDE_FILES for path in sorted(folder.glob(pattern))]
    written_anew = ("config.json", "adapter_config.json")
    return [path for path in files if path.name not in written_anew and not path.name.endswith(".index.json")]


def _write_checkpoint(model: Any, side_files: list[Path], folder: Path) -> None:
    """Save the weights and the config; a generation config only where the base has none to copy."""
    from transformers import GenerationConfig

    if any(path.name == "generation_config.json" for path in side_files):
        # Many a published one is refused by save_pretrained for options that contradict each other.
        model.generation_config = GenerationConfig()
    model.save_pretrained(folder)


def _write_pixel_limits(folder: Path, size: Any) -> None:
    """Write the image sizes in use into whichever files the image processor is loaded from."""
    limits = {"shortest_edge": size["shortest_edge"], "longest_edge": size["longest_edge"]}
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        values = content if name.startswith("pre") else content.get("image_processor")
        if values:
            values["size"] = limits
            if "min_pixels" in values or "max_pixels" in values:  # the older names win where they stand
                values.update(min_pixels=limits["shortest_edge"], max_pixels=limits["longest_edge"])
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
