"""Merge an adapter into its base, and write a checkpoint that loads elsewhere.

torch, transformers and peft are imported inside the functions: peft alone takes seconds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from vlmray.errors import OptionError, one_line
from vlmray.models.checks import SIDE_FILES, check_adapter_folder
from vlmray.storage import hub
from vlmray.storage.hub import local_folder
from vlmray.storage.weights import read_tensor_shapes

_BESIDE = "pass it as --adapter beside its base"
_EMBEDDINGS = re.compile(r"\.(?:embed_tokens|lm_head)\.(?!token_adapter\.)")


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
        ValueError: A quantised base, an adapter of another base, or one that cannot be merged exactly.
    """
    from vlmray.models.loading import load_qwen_vl_model_and_processor

    target = Path(folder).expanduser()
    _check_new_folder(target)
    config = load_base_config(model_id, trust_remote_code=trust_remote_code)
    check_adapter_folder(adapter, model_id)
    _check_not_quantized(model_id, config)
    if any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config())):
        _check_leaves_ties(adapter)
    model, processor = load_qwen_vl_model_and_processor(
        model_id,
        adapter=adapter,
        dtype=_dtype_name(config) if dtype == "auto" else dtype,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        trust_remote_code=trust_remote_code,
    )
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError) as error:
        raise OptionError("adapter", f"{adapter} cannot be merged: {one_line(error)}", _BESIDE) from error
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an earlier attempt
    partial.mkdir(parents=True)
    _write_checkpoint(merged, _side_files(model_id), partial)
    copy_side_files(model_id, partial, processor if min_pixels or max_pixels else None)
    partial.replace(target)
    return target


def load_base_config(model_id: str, *, trust_remote_code: bool) -> Any:
    """Load the config of a model that can be adapted, from here or from the hub."""
    from transformers import AutoConfig

    from vlmray.models.loading import check_model_type

    folder = local_folder(model_id)
    if folder is None:
        hub.check_reachable(model_id, "model")  # once; loading would retry for long
    check_model_type(model_id, trust_remote_code=trust_remote_code)
    return AutoConfig.from_pretrained(str(folder or model_id), trust_remote_code=trust_remote_code)


def _check_new_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an empty folder; pass a new one for the merged model")


def _check_not_quantized(model_id: str, config: Any) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise OptionError(
            "model_id",
            f"{model_id} is a quantised checkpoint ({method})",
            "an adapter merges well only into full weights: pass the checkpoint that it was made from",
        )


def _check_leaves_ties(adapter: str) -> None:
    """Refuse an adapter of embeddings or head where both are one: merged, it would change the other."""
    names = read_tensor_shapes(Path(adapter).expanduser() / "adapter_model.safetensors")
    changed = [name for name in names if _EMBEDDINGS.search(name)]
    if changed:
        problem = f"{adapter} changes {changed[0]}, and the model ties its embeddings to its head"
        raise OptionError("adapter", f"{problem}, so that merging would change both", _BESIDE)


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

        folder = Path(snapshot_download(model_id, allow_patterns=list(SIDE_FILES)))  # the cache if offline
    files = [path for pattern in SIDE_FILES for path in sorted(folder.glob(pattern))]
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
