"""What a training run leaves: the adapter or model, a merged model, and proof that they work.

    last checkpoint -> folder in the hub's formats -> loaded afresh -> checks -> output folder

The checks, in `checks.py`, are run and not promised.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vlmray import __version__
from vlmray.config import FinetuneConfig
from vlmray.finetune.checks import check_merged, check_trained, stored_dtype
from vlmray.finetune.results import ADAPTER, MERGED, MODEL, RECORD, Check
from vlmray.models import lora
from vlmray.models.merging import copy_side_files, merge_adapter
from vlmray.models.processors import load_processor
from vlmray.models.source import ModelSource
from vlmray.models.templates.chat import FILE, use_template
from vlmray.storage.run_folder import RunFolder
from vlmray.storage.scratch import scratch_folder
from vlmray.training.checkpoint import ANSWERS_FILE
from vlmray.training.run import TrainingRun
from vlmray.training.worker import Outcome

_WEIGHTS = {ADAPTER: ("adapter_config.json", "adapter_model*"), MODEL: ("config.json", "*.safetensors*")}


def write_artifacts(
    run: TrainingRun, outcome: Outcome, checkpoint: Path, folder: RunFolder
) -> tuple[Check, ...]:
    """Write adapter (or model) and merged model into the output folder, and check them.

    Args:
        run: What was trained.
        outcome: How it went.
        checkpoint: The checkpoint to keep, as a local folder.
        folder: Output folder of the run.
    """
    config, model = run.config, ModelSource.find(run.config.model_id)
    kind = ADAPTER if config.use_peft else MODEL
    answers = json.loads((checkpoint / ANSWERS_FILE).read_text(encoding="utf-8"))
    with scratch_folder() as scratch:
        trained = _collect(config, model, checkpoint, scratch / kind, kind)
        checks = check_trained(config, trained, kind, answers)
        if config.merge_adapter:
            merged = merge_adapter(
                model.path, str(trained), scratch / MERGED,
                min_pixels=config.min_pixels, max_pixels=config.max_pixels,
                trust_remote_code=config.trust_remote_code,
            )  # fmt: skip
            _write_template(config, model, merged)
            checks += check_merged(config, trained, merged, answers)
        record = json.dumps(training_record(run, outcome, checks), ensure_ascii=False, indent=2)
        (trained / RECORD).write_text(record + "\n", encoding="utf-8")
        folder.write_folder(kind, trained)
        if config.merge_adapter:
            folder.write_folder(MERGED, merged)
    return checks


def training_record(run: TrainingRun, outcome: Outcome, checks: Sequence[Check]) -> dict[str, Any]:
    """Say what an adapter was made of: versions, base, data, seed, curve and checks."""
    config = run.config
    packages = ("ray", "torch", "transformers", "trl", "peft", "accelerate")
    return {
        "vlmray": __version__,
        "versions": {name: metadata.version(name) for name in packages},
        "model_id": config.model_id,
        "model_fingerprint": ModelSource.find(config.model_id).fingerprint,
        "dataset_name": config.dataset_name,
        "dataset_split": config.dataset_split,
        "sample_slices": config.sample_slices,
        "num_samples": run.num_samples,
        "seed": config.seed,
        "num_workers": run.num_workers,
        "num_steps": outcome.num_steps,
        "num_images": outcome.num_images,
        "num_images_encoded": outcome.num_encoded,
        "targets": lora.abbreviate_names(outcome.targets),
        "options": dataclasses.asdict(config),
        "history": [_without_nan(entry) for entry in outcome.history],
        "failed": outcome.errors,
        "failed_in_evaluation": outcome.eval_errors,
        "checks": [dataclasses.asdict(check) for check in checks],
    }


def _without_nan(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Spell out numbers that JSON does not have."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in entry.items()
    }


def _collect(config: FinetuneConfig, model: ModelSource, checkpoint: Path, folder: Path, kind: str) -> Path:
    """Take the weights out of a checkpoint, and put the base's processor files beside them."""
    folder.mkdir()
    for pattern in _WEIGHTS[kind]:
        for path in checkpoint.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    if kind == MODEL:
        _store_as(None if model.folder is None else stored_dtype(model.folder), folder)
    low, high = config.min_pixels, config.max_pixels
    processor = load_processor(model.path, min_pixels=low, max_pixels=high) if low or high else None
    copy_side_files(model.path, folder, processor)
    _write_template(config, model, folder)
    return folder


def _write_template(config: FinetuneConfig, model: ModelSource, folder: Path) -> None:
    """Put the chat template of the options beside weights, where a checkpoint has its own."""
    if config.chat_template or config.chat_template_kwargs:
        processor = load_processor(model.path, trust_remote_code=config.trust_remote_code)
        use_template(processor, config)
        (folder / FILE).write_text(processor.chat_template, encoding="utf-8")


def _store_as(dtype: str | None, folder: Path) -> None:
    """Round the weights of a model, which were trained in float32, to the precision its base is stored in."""
    if dtype not in ("bfloat16", "float16"):
        return
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        rounded = {
            name: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }
        save_file(rounded, path, metadata={"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "dtype" in part:
            part["dtype"] = dtype
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
