"""Load a vision-language model, its processor and its adapters; the plain way to generate."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PROCESSOR_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedConfig,
)

from vlmray.models.checks import check_adapter_folder, check_model_folder, check_model_kind, local_folder
from vlmray.schema import GenerationRequest
from vlmray.storage import hub

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_QUANTIZATIONS = ("none", "8bit", "4bit")


def load_qwen_vl_model_and_processor(
    model_id: str,
    *,
    adapter: str | None = None,
    quantization: str = "none",
    dtype: str = "auto",
    device_map: Any = "auto",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load an image-text-to-text model for generation, with the processor that feeds it.

    Made for Qwen2.5-VL; decoder-only models of other families load the same way. Weights are read from
    safetensors files only. The device is a GPU where there is one, otherwise the CPU.

    Args:
        model_id: Local checkpoint folder or hub id.
        adapter: Folder of a LoRA adapter of that very model; the model returned is then a `PeftModel`
            whose active adapter is called `default`.
        quantization: `8bit` or `4bit` (NF4, double quantisation) by bitsandbytes, or `none`.
        dtype: Of the weights, or of the arithmetic under quantisation. `auto` is the checkpoint's own on
            a GPU and float32 on a CPU.
        device_map: Passed to transformers where there is a GPU; None loads without one.
        min_pixels: Smallest image area in pixels after resizing; None keeps the checkpoint's.
        max_pixels: Largest image area in pixels after resizing; None keeps the checkpoint's.
        attn_implementation: Passed to transformers; None lets it choose.
        trust_remote_code: Run model code that comes with the checkpoint.

    Returns:
        The model in eval mode, and its processor with left padding and the PIL image path.

    Raises:
        ValueError: Unknown option, unreachable hub id, another kind of model, adapter of another base.
        FileNotFoundError: A folder that is not there or lacks weights.
    """
    _check_choice("--quantization", quantization, _QUANTIZATIONS)
    _check_choice("--dtype", dtype, ("auto", *_DTYPES))
    check_model_folder(model_id)
    if local_folder(model_id) is None:
        hub.check_reachable(model_id, "model", option="--model_id")  # once; loading would retry for long
    if adapter is not None:
        check_adapter_folder(adapter, model_id)
    torch_dtype = resolve_dtype(dtype)
    kwargs: dict[str, Any] = {
        "dtype": torch_dtype,
        # On a CPU a map would only make PEFT wrap every layer in device hooks.
        "device_map": device_map if torch.cuda.is_available() else None,
        "trust_remote_code": trust_remote_code,
    }
    if quantization != "none":
        kwargs["quantization_config"] = _quantization_config(quantization, torch_dtype)
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    model = _load_model(model_id, kwargs)
    processor = load_processor(
        model_id, min_pixels=min_pixels, max_pixels=max_pixels, trust_remote_code=trust_remote_code
    )
    if adapter is not None:
        model = attach_adapter(model, adapter, name="default")
    return model, processor


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
    if trust_remote_code and "AutoModelForImageTextToText" in (config.get("auto_map") or {}):
        return
    model_type = str(config.get("model_type"))
    models = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in models:
        raise ValueError(
            f"--model_id {model_id} has model type {model_type!r}, which the installed transformers "
            "does not have as an image-text-to-text model; pass such a model, for example "
            "Qwen/Qwen2.5-VL-3B-Instruct"
        )


def resolve_dtype(dtype: str) -> Any:
    """Return torch's dtype for a `--dtype` value; on a GPU `auto` stays, for transformers to resolve."""
    if dtype == "auto":
        return "auto" if torch.cuda.is_available() else torch.float32
    return _DTYPES[dtype]


def load_processor(
    model_id: str,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a model's processor with left padding and images by way of PIL.

    torchvision is not needed, and where it is installed images still take the PIL path, so that the
    same image gives the same pixels on every machine. Without torchvision the processor has no video
    part.

    Args:
        model_id: Local checkpoint folder or hub id.
        min_pixels: Smallest image area in pixels after resizing; None keeps the checkpoint's.
        max_pixels: Largest image area in pixels after resizing; None keeps the checkpoint's.
        trust_remote_code: Run processor code that comes with the checkpoint.

    Raises:
        ValueError: Pixel limits that contradict each other, or that this image processor does not have.
    """
    try:
        processor = AutoProcessor.from_pretrained(model_id, trust_remote_code=trust_remote_code)
    except ImportError as error:
        processor = _load_processor_without_video(model_id, error, trust_remote_code=trust_remote_code)
    if getattr(processor.image_processor, "backend", "pil") != "pil":
        processor.image_processor = AutoImageProcessor.from_pretrained(
            model_id, backend="pil", trust_remote_code=trust_remote_code
        )
    processor.tokenizer.padding_side = "left"
    _set_pixel_limits(processor.image_processor, min_pixels, max_pixels)
    return processor


def attach_adapter(model: Any, adapter: str, *, name: str) -> Any:
    """Load a LoRA adapter into a model under a name, and refuse one that would not take full effect.

    Args:
        model: The base, or a `PeftModel` that already has other adapters.
        adapter: Folder with `adapter_config.json` and `adapter_model.safetensors`.
        name: The adapter's name in the model; letters, digits and underscores.

    Returns:
        The `PeftModel`: the same object if `model` was one. A first adapter becomes the active one.

    Raises:
        ValueError: Weights that the model has no place for, places left without weights (both happen
            when layer names changed between versions), or other shapes.
    """
    try:
        if not is_peft_model(model):
            from peft import PeftModel  # imports bitsandbytes, which takes seconds: only when needed

            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
                model = PeftModel.from_pretrained(model, adapter, adapter_name=name)
        # For the adapter just made this only reads the file again; it is the call that reports the keys.
        result = model.load_adapter(adapter, adapter_name=name, torch_device=str(model.device))
    except (RuntimeError, ValueError) as error:
        _drop_adapter(model, name)
        first_lines = " ".join(str(error).split())[:300]
        raise ValueError(f"--adapter {adapter} does not fit the model: {first_lines}") from error
    missing, unexpected = list(result.missing_keys), list(result.unexpected_keys)
    if missing or unexpected:
        _drop_adapter(model, name)
        raise ValueError(
            f"--adapter {adapter} does not fit the model: {len(unexpected)} of its weights have no place "
            f"({', '.join(unexpected[:1]) or 'none'}), {len(missing)} places got no weight "
            f"({', '.join(missing[:1]) or 'none'}); train it again with the installed versions"
        )
    return model.eval()


def detach_adapter(model: Any, name: str) -> Any:
    """Take an adapter out of a `PeftModel`; return the bare base once there is no other."""
    if len(model.peft_config) == 1:
        return model.unload()
    model.delete_adapter(name)
    return model


def is_peft_model(model: Any) -> bool:
    """Tell whether a model is wrapped by PEFT, without importing PEFT."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def adapts_language_alone(model: Any) -> bool:
    """Tell whether all adapters of a `PeftModel` are on layers of its language model."""
    adapted = {name.rpartition(".lora_A")[0] for name, _ in model.named_modules() if ".lora_A" in name}
    return all(".language_model." in name or name.endswith(".lm_head") for name in adapted)


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
    images = sample.images if isinstance(sample, GenerationRequest) else _images_of(messages)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[prompt], images=images or None, return_tensors="pt").to(device or model.device)
    config = copy.deepcopy(model.generation_config)
    config.update(do_sample=False, temperature=1.0, top_p=1.0, top_k=50, max_new_tokens=max_new_tokens)
    with torch.inference_mode():
        output = model.generate(**inputs, generation_config=config)
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new_tokens, skip_special_tokens=True), prompt


def _images_of(messages: Sequence[dict[str, Any]]) -> list[Any]:
    parts = [part for m in messages if not isinstance(m["content"], str) for part in m["content"]]
    return [part["image"] for part in parts if part.get("type") == "image"]


def _check_choice(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"unknown value {value!r} for {option}; known: {', '.join(known)}")


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
        raise ValueError(
            f"--model_id {model_id} is neither cached in full nor to be had from the hub: pass builtin, "
            "a local checkpoint folder, or set HF_HOME to a cache that holds it"
        ) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"--model_id {model_id}: {len(missing)} weights are not in the checkpoint ({missing[0]}, ...) "
            "and would be random; pass a complete checkpoint of an image-text-to-text model"
        )
    embed_patches_by_matmul(model)
    return model.eval()


def embed_patches_by_matmul(model: Any) -> None:
    """Let vision towers of Qwen's kind embed patches with a matrix product.

    Their patches come cut out and flattened, and the convolution over each has the size of the patch: it is
    a linear layer. Called as a convolution it is many times slower, above all backwards.
    """
    for module in model.modules():
        projection = getattr(module, "proj", None)
        if type(module).__name__.endswith("VisionPatchEmbed") and _covers_its_input(module, projection):
            module.forward = functools.partial(_embed_patches, module)


def _covers_its_input(module: Any, projection: Any) -> bool:
    if not isinstance(projection, torch.nn.Conv3d) or projection.groups != 1:
        return False
    if hasattr(module, "_hf_hook") or hasattr(projection, "_hf_hook"):
        return False  # accelerate moves its weights when it is called
    patch = (module.temporal_patch_size, module.patch_size, module.patch_size)
    return projection.kernel_size == projection.stride == patch and projection.padding == (0, 0, 0)


def _embed_patches(module: Any, patches: torch.Tensor) -> torch.Tensor:
    """Embed flattened patches (P, channels x time x height x width); return (P, hidden)."""
    projection = module.proj
    if type(projection) is not torch.nn.Conv3d:  # an adapter was put around it since
        return type(module).forward(module, patches)
    weight = projection.weight.flatten(1)
    return torch.nn.functional.linear(patches.view(-1, weight.shape[1]).to(weight), weight, projection.bias)


def _load_processor_without_video(model_id: str, cause: ImportError, *, trust_remote_code: bool) -> Any:
    """Load a processor whose video part cannot be imported, without that part.

    transformers has video processors for torchvision only, and AutoProcessor gives up where it is not
    installed even if no video is ever shown. A processor class that does not list the video part as an
    attribute is loaded without it, and its `__init__` takes None for it.
    """
    config = AutoConfig.from_pretrained(model_id, trust_remote_code=trust_remote_code)
    base: Any = PROCESSOR_MAPPING.get(type(config), None)
    if base is None or "video_processor" not in base.get_attributes():
        raise cause
    attributes = [name for name in base.get_attributes() if name != "video_processor"]
    # The name is kept because save_pretrained writes it, for AutoProcessor to find elsewhere.
    members = {"get_attributes": classmethod(lambda cls: list(attributes))}
    without_video: Any = type(base.__name__, (base,), members)
    return without_video.from_pretrained(model_id, trust_remote_code=trust_remote_code)


def _set_pixel_limits(image_processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    if min_pixels is None and max_pixels is None:
        return
    size = image_processor.size
    smallest = min_pixels if min_pixels is not None else getattr(size, "shortest_edge", None)
    largest = max_pixels if max_pixels is not None else getattr(size, "longest_edge", None)
    if smallest is None or largest is None or not hasattr(image_processor, "merge_size"):
        raise ValueError(
            f"--min_pixels and --max_pixels do not apply to {type(image_processor).__name__}, which resizes "
            f"to {size}; leave them out"
        )
    if not 0 < smallest <= largest:
        raise ValueError(f"--min_pixels {smallest} must be above 0 and not above --max_pixels {largest}")
    image_processor.size = type(size)(shortest_edge=smallest, longest_edge=largest)


def _drop_adapter(model: Any, name: str) -> None:
    """Leave a model that served other adapters as it was before the failed load."""
    if is_peft_model(model) and name in model.peft_config and len(model.peft_config) > 1:
        model.delete_adapter(name)
