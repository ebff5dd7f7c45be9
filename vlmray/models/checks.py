"""Check model and adapter folders before anything heavy is loaded. Standard library only.

A job calls these in its first second, so that a wrong path, a pickle checkpoint or an adapter of another
base ends it with one clear line, not after minutes on every worker. Shapes are read from safetensors
headers (eight bytes of length, then JSON); no weight is read.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmray.errors import OptionError, mistake_in
from vlmray.models.adapter_kinds import tell_kind
from vlmray.models.families import family_of
from vlmray.storage.hub import local_folder
from vlmray.storage.weights import check_not_a_pointer, check_whole, read_tensor_shapes

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_PICKLES = ("*.bin", "*.pt", "*.pth")

SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")
"""What lies beside a checkpoint's weights: processor, tokenizer, chat template, generation, code."""

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.*", "*.tiktoken", "spiece.model", "tekken.json")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")

_ENCODER_DECODERS = frozenset(
    {"florence2", "pix2struct", "pp_formulanet", "t5", "t5gemma2", "udop", "vision-encoder-decoder"}
)
"""Model types whose config need not say `is_encoder_decoder`, as it is their default."""

_OTHER_KINDS = {
    "blip": "a captioner that changes the prompt",  # its `generate` rewrites both ends, padding or not
    "diffusion_gemma": "a diffusion model",
    "evolla": "a model of proteins",
    "instructblipvideo": "a model of videos alone",
    "pi0": "a robot's policy",
}
"""What else transformers has as image-text-to-text models, but does not continue a prompt with images."""

REFUSED_TYPES = _ENCODER_DECODERS | _OTHER_KINDS.keys()
"""Model types that are refused whatever else their config says."""


_TIMM_TOWERS = frozenset({"gemma3n_vision", "timm_wrapper"})
"""Model types of vision encoders that transformers leaves to timm."""


def check_model_folder(model_id: str) -> None:
    """Check that `model_id` is a loadable checkpoint folder, or at least looks like a hub id.

    Raises:
        FileNotFoundError: A path that is not there, or a folder without config or safetensors weights.
        ValueError: Neither a folder nor a possible hub id, or a kind of model that no engine runs.
    """
    folder = Path(model_id).expanduser()
    if folder.is_file():
        raise OptionError("model_id", f"{model_id} is a file", "pass the folder that it is in")
    if not model_id or not folder.is_dir():  # an empty string would be the current folder
        _check_hub_id(model_id)
        snapshot = local_folder(model_id)
        if snapshot is not None:
            _check_config(model_id, snapshot)
        return
    if not (folder / "config.json").is_file():
        is_adapter = (folder / "adapter_config.json").is_file()
        hint = "that is an adapter: pass it as --adapter" if is_adapter else "pass a checkpoint folder"
        raise FileNotFoundError(f"--model_id {model_id}: no config.json in this folder; {hint}")
    if not list(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"--model_id {model_id}: no *.safetensors weights in this folder{_convert_hint(folder)}"
        )
    with mistake_in("model_id"):
        for path in _side_files(folder):
            check_not_a_pointer(path)
    model_config = _check_config(model_id, folder)
    with mistake_in("model_id"):
        check_whole(folder)
    _check_processor(model_id, folder, model_config)


def check_model_kind(model_id: str, config: Mapping[str, Any]) -> None:
    """Refuse a model that does not continue a prompt with images token by token, by what its config says.

    Args:
        model_id: As the user gave it.
        config: Content of `config.json`.

    Raises:
        ValueError: It is an encoder-decoder, or of another kind that no engine runs.
    """
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, dict) else [config]
    kind = _OTHER_KINDS.get(str(config.get("model_type")))
    if any(part.get("is_encoder_decoder") or part.get("model_type") in _ENCODER_DECODERS for part in parts):
        kind = "an encoder-decoder model"
    if kind is not None:
        raise OptionError(
            "model_id",
            f"{model_id}: {config.get('model_type')} is {kind}",
            "vlmray runs decoder-only image-text-to-text models: pass one, such as a qwen2_5_vl, qwen3_vl or "
            "llava",
        )


def check_adapter_folder(adapter: str, model_id: str) -> None:
    """Check that `adapter` is a LoRA folder in safetensors made for the base `model_id`.

    A base that moved or has another name is accepted if every adapted layer has the adapter's shapes.
    Where the base is not on this machine only the names can be compared; loading checks the rest.

    Raises:
        FileNotFoundError: The folder, its config or its safetensors weights are missing.
        ValueError: The adapter is of a kind that is not known to be answered exactly, or was made for
            another base; the message says what was found and expected.
    """
    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"--adapter {adapter}: no such folder; pass a folder that fine-tuning wrote")
    config = _read_json(folder / "adapter_config.json", option="adapter", value=adapter)
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"--adapter {adapter}: no adapter_model.safetensors{_convert_hint(folder)}")
    shapes = read_tensor_shapes(weights)
    tell_kind(adapter, config, shapes)
    base = local_folder(model_id)
    if base is None or config.get("target_parameters"):  # those may be of any shape
        return
    problem = _shape_problem(shapes, _base_shapes(base))
    if problem:
        raise OptionError(
            "adapter",
            f"{adapter} was made for {config.get('base_model_name_or_path')!r} and does not fit --model_id "
            f"{model_id}: {problem}",
            "pass the adapter's own base, or fine-tune one for this model",
        )


def _check_hub_id(model_id: str) -> None:
    looks_like_path = model_id.startswith((".", "/", "~")) or model_id.count("/") > 1
    if looks_like_path:
        raise FileNotFoundError(
            f"--model_id {model_id}: no such folder; pass a checkpoint folder or a hub id"
        )
    if not _HUB_ID.fullmatch(model_id) or ".." in model_id or "--" in model_id:
        raise OptionError(
            "model_id", f"{model_id!r} is neither a folder nor a hub id such as Qwen/Qwen2.5-VL-7B-Instruct"
        )


def _check_config(model_id: str, folder: Path) -> dict[str, Any]:
    config = _read_json(folder / "config.json", option="model_id", value=model_id)
    check_model_kind(model_id, config)
    check_packages(model_id, config)
    return config


def check_packages(model_id: str, config: Mapping[str, Any]) -> None:
    """Refuse a model whose processor or vision encoder needs packages that are not here.

    Args:
        model_id: As the user gave it.
        config: Content of `config.json`.

    Raises:
        ValueError: It names the packages.
    """
    missing = [name for name in family_of(config).needs if importlib.util.find_spec(name) is None]
    if missing:
        raise OptionError(
            "model_id",
            f"{model_id}: the processor of {config.get('model_type')} needs {' and '.join(missing)}",
            f"pip install {' '.join(missing)}, or 'vlmray[vision]'",
        )
    tower = (config.get("vision_config") or {}).get("model_type")
    if tower in _TIMM_TOWERS and importlib.util.find_spec("timm") is None:
        problem = f"{model_id}: the vision encoder of {config.get('model_type')} needs timm"
        raise OptionError("model_id", problem, "pip install timm")


def _side_files(folder: Path) -> list[Path]:
    return sorted(path for pattern in SIDE_FILES for path in folder.glob(pattern) if path.is_file())


def _check_processor(model_id: str, folder: Path, model_config: Mapping[str, Any]) -> None:
    """Check that what is beside the weights is there, and JSON where it has to be."""
    configs = [
        _read_json(path, option="model_id", value=model_id)
        for path in _side_files(folder)
        if path.name in (*_PROCESSORS, "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    ]
    if any(folder.glob("*.py")):
        return  # which may call their files whatever they like
    for what, patterns in (("tokenizer", _TOKENIZERS), ("image processor", _PROCESSORS)):
        _require(model_id, folder, what, patterns)
    has_template = family_of(model_config).chat_template or any(each.get("chat_template") for each in configs)
    if not has_template:
        _require(model_id, folder, "chat template", _TEMPLATES)


def _require(model_id: str, folder: Path, what: str, patterns: Sequence[str]) -> None:
    if not any(path.stat().st_size for pattern in patterns for path in folder.glob(pattern)):
        raise FileNotFoundError(
            f"--model_id {model_id}: no {what} in this folder ({patterns[0]} or the like); copy it from "
            "the model's repository"
        )


def _convert_hint(folder: Path) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if not pickles:
        return ""
    return (
        f", only {pickles[0]}: pickle files can run code and are not loaded; if you trust them, load them "
        "once with transformers or peft and write them with save_pretrained(folder)"
    )


def _read_json(path: Path, *, option: str, value: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"--{option} {value}: no {path.name} in this folder; pass a folder that fine-tuning wrote"
        )
    with mistake_in(option):
        check_not_a_pointer(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OptionError(option, f"{value}: {path.name} is not JSON ({error})", "write it again") from error
    if not isinstance(found, dict):
        problem = f"{value}: {path.name} holds a {type(found).__name__}, expected an object"
        raise OptionError(option, problem)
    return found


def _base_shapes(folder: Path) -> dict[str, set[tuple[int, ...]]]:
    """Collect the shapes of the base's weight matrices under each layer path that adapters can name."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, shape in read_tensor_shapes(path).items():
            if name.endswith(".weight") and len(shape) == 2:
                shapes.setdefault(_layer_path(name.removesuffix(".weight")), set()).add(shape)
    return shapes


def _layer_path(module: str) -> str:
    """Cut a module name down to what survives renames: everything from its layer or block number's list.

    `model.language_model.layers.0.mlp.up_proj` on the loaded model is `model.layers.0.mlp.up_proj` in
    older checkpoints; both become `layers.0.mlp.up_proj`.
    """
    match = re.search(r"\w+\.\d+\..+", module)
    return match.group() if match else module.rsplit(".", 1)[-1]


def _shape_problem(adapter: dict[str, tuple[int, ...]], base: dict[str, set[tuple[int, ...]]]) -> str | None:
    """Return the first way in which the adapter's tensors do not fit the base, or None."""
    for name, shape in adapter.items():
        match = _LORA_KEY.fullmatch(name)
        if match is None or len(shape) != 2:
            continue
        layer = _layer_path(match["module"])
        found = base.get(layer)
        if found is None and layer == "lm_head":
            continue  # that of a model which ties it to its embeddings is not stored
        if found is None:
            return f"the adapter changes {layer}, which the model does not have"
        axis = 1 if match["side"] == "A" else 0
        widths = sorted({base_shape[axis] for base_shape in found})
        # A 4-bit checkpoint stores its matrices as one packed column, which says nothing of the shape.
        if shape[axis] not in widths and 1 not in {base_shape[1] for base_shape in found}:
            side = "input" if axis == 1 else "output"
            return f"{layer} has {side} width {shape[axis]} in the adapter and {widths[0]} in the model"
    return None
