"""Load a vision-language model with its processor and adapter; the plain way to generate."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedConfig,
)

from vlmray.config import LoadingConfig
from vlmray.errors import OptionError
from vlmray.models.adapters import attach_adapter
from vlmray.models.checks import check_adapter_folder, check_model_folder, check_model_kind, check_packages
from vlmray.models.families import family_of
from vlmray.models.processors import load_processor
from vlmray.models.prompts import ChatPrompts
from vlmray.models.source import warn_of_settings
from vlmray.models.templates.chat import use_template
from vlmray.schema import GenerationRequest
from vlmray.storage import hub
from vlmray.storage.hub import local_folder

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STRETCHED = ("linear", "dynamic", "yarn")
"""Kinds of rotary positions whose config may give the length before they were stretched."""

_QUANTIZATIONS = ("none", "8bit", "4bit")


def load_qwen_vl_model_and_processor(
    model_id: str, *, adapter: str | None = None, device_map: Any = "auto", **options: Any
) -> tuple[Any, Any]:
    """Load an image-text-to-text model and the processor that feeds it: `load_checkpoint` by keywords.

    Args:
        model_id: Local checkpoint folder or hub id.
        adapter: Folder of a LoRA adapter of that very model.
        device_map: Passed to transformers where there is a GPU; None loads without one.
        **options: Options of `vlmray.config.LoadingConfig`, with its defaults: `quantization`, `dtype`,
            `attn_implementation`, `min_pixels`, `max_pixels`, `trust_remote_code`.

    Returns:
        The model in eval mode, and its processor with left padding and the PIL image path.

    Raises:
        ValueError: Unknown option, unreachable hub id, another kind of model, adapter of another base.
        FileNotFoundError: A folder that is not there or lacks weights.
    """
    return load_checkpoint(model_id, LoadingConfig(**options), adapter=adapter, device_map=device_map)


def load_checkpoint(
    model_id: str, config: LoadingConfig, *, adapter: str | None = None, device_map: Any = "auto"
) -> tuple[Any, Any]:
    """Load an image-text-to-text model for generation, with the processor that feeds it.

    Made for Qwen2.5-VL; decoder-only models of other families load the same way. Weights are read from
    safetensors files only. The device is a GPU where there is one, otherwise the CPU.

    Args:
        model_id: Local checkpoint folder or hub id.
        config: How it is loaded. Quantization is NF4 with double quantisation at `4bit`; `dtype` is then
            that of the arithmetic.
        adapter: Folder of a LoRA adapter of that very model; the model returned is then a `PeftModel`.
        device_map: Passed to transformers where there is a GPU; None loads without one.

    Returns:
        The model in eval mode, and its processor with left padding and the PIL image path.

    Raises:
        ValueError: Unknown option, unreachable hub id, another kind of model, adapter of another base.
        FileNotFoundError: A folder that is not there or lacks weights.
    """
    _check_choice("quantization", config.quantization, _QUANTIZATIONS)
    _check_choice("dtype", config.dtype, ("auto", *_DTYPES))
    check_model_folder(model_id)
    if local_folder(model_id) is None:
        hub.check_reachable(model_id, "model")  # once; loading would retry for long
    if adapter is not None:
        check_adapter_folder(adapter, model_id)
    model = _load_model(model_id, _model_options(config, device_map))
    processor = load_processor(
        model_id,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
        trust_remote_code=config.trust_remote_code,
    )
    use_template(processor, config)
    if adapter is not None:
        model = attach_adapter(model, adapter)
    return model, processor


def _model_options(config: LoadingConfig, device_map: Any) -> dict[str, Any]:
    """Return the options as transformers takes them."""
    dtype = resolve_dtype(config.dtype)
    options: dict[str, Any] = {
        "dtype": dtype,
        # On a CPU a map would only make PEFT wrap every layer in device hooks.
        "device_map": device_map if torch.cuda.is_available() else None,
        "trust_remote_code": config.trust_remote_code,
    }
    if config.quantization != "none":
        options["quantization_config"] = _quantization_config(config.quantization, dtype)
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    return options


def check_model_type(model_id: str, *, trust_remote_code: bool = False) -> None:
    """Refuse a model that is no decoder-only image-text-to-text model, before any of its weights is read.

    Args:
        model_id: Local checkpoint folder or hub id.
        trust_remote_code: The model may be of a type that comes with the checkpoint.

    Raises:
        ValueError: It is of another kind, or of a type that the installed transformers does not have.
        OSError: Its config is not to be had.
    """
    config, _ = PreTrainedConfig.get_config_dict(str(local_folder(model_id) or model_id))
    check_model_kind(model_id, config)
    check_packages(model_id, config)
    if trust_remote_code and "AutoModelForImageTextToText" in (config.get("auto_map") or {}):
        return
    model_type = str(config.get("model_type"))
    models = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in models:
        raise OptionError(
            "model_id",
            f"{model_id} has model type {model_type!r}, which the installed transformers does not have as an "
            "image-text-to-text model",
            "pass such a model, for example Qwen/Qwen2.5-VL-3B-Instruct",
        )


def resolve_dtype(dtype: str) -> Any:
    """Return torch's dtype for a `--dtype` value; on a GPU `auto` stays, for transformers to resolve."""
    if dtype == "auto":
        return "auto" if torch.cuda.is_available() else torch.float32
    return _DTYPES[dtype]


def find_max_model_len(config: Any) -> int | None:
    """Return how many positions a model has, for a prompt and its answer; None where its config does not say.

    Args:
        config: Of the model, as transformers has it.
    """
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    if not isinstance(length, int) or rope.get("rope_type") not in _STRETCHED:
        return length if isinstance(length, int) and length > 0 else None
    return max(length, int(rope.get("factor", 1) * rope.get("original_max_position_embeddings", length)))


def find_not_finite(weights: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Return the name of the first weight with a value that is NaN or infinite; None if there is none."""
    for name, weight in weights:
        if weight.is_meta or weight.dtype not in _DTYPES.values() or not weight.numel():
            continue
        smallest, largest = weight.detach().aminmax()  # reads once and copies nothing; NaN wins in both
        if not (smallest.isfinite() and largest.isfinite()):
            return name
    return None


def generate_text_from_sample(
    model: Any,
    processor: Any,
    sample: GenerationRequest | Sequence[dict[str, Any]],
    max_new_tokens: int = 512,
    device: str | None = None,
) -> tuple[str, str]:
    """Answer one sample the plain way: chat template, processor, greedy `model.generate`, decode.

    This is the reference that the engine is tested against, and the shortest way to try a model.

    Args:
        model: An image-text-to-text model.
        processor: Its processor.
        sample: A request, or chat messages whose image parts hold their picture:
            `{"type": "image", "image": <PIL image>}`.
        max_new_tokens: Most tokens to write; a request's own limit is not used.
        device: Where the inputs go; None is the model's device.

    Returns:
        The answer without special tokens, and the prompt as the chat template wrote it.
    """
    messages = sample.messages if isinstance(sample, GenerationRequest) else list(sample)
    images: list[Any] = list(sample.images) if isinstance(sample, GenerationRequest) else _images_of(messages)
    prompts = ChatPrompts(processor)
    prompt = prompts.render(messages, add_generation_prompt=True)
    row = prompts.encode(prompt, images)
    inputs: dict[str, Any] = {name: tensor.to(device or model.device) for name, tensor in row.items()}
    config = copy.deepcopy(model.generation_config)
    config.update(do_sample=False, temperature=1.0, top_p=1.0, top_k=50, max_new_tokens=max_new_tokens)
    with torch.inference_mode():
        output = model.generate(**inputs, generation_config=config)
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new_tokens, skip_special_tokens=True), prompts.readable(prompt)


def first_logits(model: Any, processor: Any, request: GenerationRequest) -> torch.Tensor:
    """Return the logits (V,) of the first token of an answer, in float32 on the CPU, by a plain pass."""
    prompts = ChatPrompts(processor)
    prompt = prompts.render(request.messages, add_generation_prompt=True)
    images: list[Any] = list(request.images)
    inputs = {name: tensor.to(model.device) for name, tensor in prompts.encode(prompt, images).items()}
    with torch.inference_mode():
        return model(**inputs).logits[0, -1].float().cpu()


def _images_of(messages: Sequence[dict[str, Any]]) -> list[Any]:
    parts = [part for m in messages if not isinstance(m["content"], str) for part in m["content"]]
    return [part["image"] for part in parts if part.get("type") == "image"]


def _check_choice(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise OptionError(option, f": unknown value {value!r}", f"known: {', '.join(known)}")


def _quantization_config(quantization: str, dtype: Any) -> BitsAndBytesConfig:
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
    )


def _load_model(model_id: str, kwargs: dict[str, Any]) -> Any:
    """Load the weights, and refuse a checkpoint that leaves some of them random."""
    try:
        check_model_type(model_id, trust_remote_code=kwargs["trust_remote_code"])
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            model_id, use_safetensors=True, output_loading_info=True, **kwargs
        )
    except OSError as error:
        if Path(model_id).is_dir():
            raise
        raise OptionError(
            "model_id",
            f"{model_id} is neither cached in full nor to be had from the hub: pass builtin, a local "
            "checkpoint folder, or set HF_HOME to a cache that holds it",
        ) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise OptionError(
            "model_id",
            f"{model_id}: {len(missing)} weights are not in the checkpoint ({missing[0]}, ...) and would be "
            "random",
            "pass a complete checkpoint of an image-text-to-text model",
        )
    broken = find_not_finite(model.named_parameters())
    if broken is not None:
        raise OptionError(
            "model_id",
            f"{model_id}: the weight {broken} holds values that are not finite (NaN or infinity)",
            "download or write the checkpoint again",
        )
    _leave_weights_as_they_are(model)
    family = family_of(model.config)
    family.prepare(model)
    if not family.is_tested:
        logger.warning(
            "%s: model type %r is not among the tested families (docs/families.md); rows go through it whole",
            model_id,
            model.config.model_type,
        )
    warn_of_settings(model_id, vars(model.generation_config))
    return model.eval()


def _leave_weights_as_they_are(model: Any) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew for a CPU with AVX-512.

    `state_dict`, which PEFT calls for each adapter that it loads, undoes the packing with loss, and the base
    would answer otherwise from then on.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
