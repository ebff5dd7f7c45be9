"""The options of a run as TRL and transformers take them, and their checks.

FinetuneConfig, TrainingRun -> SFTConfig
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, get_scheduler
from trl import SFTConfig

from vlmray.config import FinetuneConfig
from vlmray.errors import OptionError
from vlmray.training.optimizers import MUON, check_optimizer
from vlmray.training.run import TRAIN, TrainingRun

_REPORTERS = {"tensorboard": ("tensorboardX", "tensorboard"), "wandb": ("wandb",), "mlflow": ("mlflow",)}


_SET_BY_VLMRAY = (
    "packing", "padding_free", "packing_strategy", "eval_packing",
    "assistant_only_loss", "completion_only_loss", "remove_unused_columns", "dataset_kwargs",
    "dataset_text_field", "dataset_num_proc", "shuffle_dataset", "dataloader_num_workers",
    "dataloader_drop_last", "ignore_data_skip", "eval_strategy", "eval_on_start",
    "save_strategy", "logging_strategy", "do_train", "do_eval", "do_predict", "metric_for_best_model",
    "greater_is_better", "resume_from_checkpoint", "hub_model_id", "hub_token", "hub_strategy",
    "hub_always_push", "hub_revision",
    "warmup_steps", "data_seed", "disable_tqdm", "label_names", "use_cpu", "save_only_model",
    "model_init_kwargs", "chat_template_path", "eos_token", "pad_token", "auto_find_batch_size", "fp16",
    "average_tokens_across_devices",
)  # fmt: skip
"""Fields of SFTConfig that are decided here, beside those that have an option, or make no sense with images,
planned batches or Ray."""


def sft_arguments(run: TrainingRun, scratch: Path, world_size: int, *, goes_on: bool = False) -> SFTConfig:
    """Translate the options into TRL's.

    Args:
        run: What to do.
        scratch: Folder for checkpoints.
        world_size: Workers that there are now.
        goes_on: There is a checkpoint: the model before training was evaluated when that began.

    Raises:
        ValueError: bfloat16 where this worker's device has none.
    """
    given = parse_sft_config(run.config.sft_config)
    return SFTConfig(**{**_translate(run, scratch, world_size, goes_on=goes_on), **given})


def _translate(run: TrainingRun, scratch: Path, world_size: int, *, goes_on: bool) -> dict[str, Any]:
    config = run.config
    on_gpu = torch.cuda.is_available()
    has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.bf16 and on_gpu and not has_bf16:
        found = torch.cuda.get_device_name()
        raise OptionError(
            "bf16", f"needs a GPU with bfloat16 (Ampere or newer), found {found}", "leave it out"
        )
    checkpointing = on_gpu if config.gradient_checkpointing is None else config.gradient_checkpointing
    evaluates = run.num_eval_samples > 0
    return {
        "output_dir": str(scratch),
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "per_device_eval_batch_size": config.per_device_eval_batch_size,
        "gradient_accumulation_steps": run.plan(TRAIN, world_size).accumulation,
        "learning_rate": config.learning_rate,
        "max_steps": run.num_steps,
        "warmup_steps": config.warmup_ratio,  # transformers 5 reads a number below 1 as a share
        "lr_scheduler_type": config.lr_scheduler_type,
        "weight_decay": config.weight_decay,
        **({} if config.optim in (None, MUON) else {"optim": config.optim}),
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        "bf16": has_bf16 if config.bf16 is None else config.bf16,
        "logging_steps": config.logging_steps,
        "logging_nan_inf_filter": False,  # a loss that is not a number must show
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": config.eval_steps,
        "eval_on_start": evaluates and not goes_on,
        "metric_for_best_model": run.eval_metric if evaluates else None,
        "greater_is_better": run.greater_is_better,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "seed": config.seed,
        "report_to": config.report_to,
        "use_cpu": not on_gpu,
        "max_length": None,  # a row is trained whole or not at all: see the collator
        "packing": False,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "log_level": "error",
        # Every batch holds an image, so every trained parameter takes part; looking for others costs time.
        "ddp_find_unused_parameters": run.image_optional,
        **({"fsdp": True} if config.fsdp else {}),
    }


def parse_sft_config(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Check further fields of SFTConfig and convert their values as transformers' own scripts would.

    Raises:
        ValueError: a field that does not exist, is decided elsewhere, or takes no such value.
    """
    own = {field.name for field in fields(FinetuneConfig)}
    known = {field.name for field in fields(SFTConfig)}
    words: list[str] = []
    for name, value in (given or {}).items():
        if name in own:
            raise OptionError("sft_config", f": {name} has an option of its own, --{name}")
        if name in _SET_BY_VLMRAY:
            raise OptionError("sft_config", f": {name} is set by vlmray and cannot be changed here")
        if name not in known:
            raise OptionError("sft_config", f": SFTConfig has no field {name!r}", "see TRL's documentation")
        if value is None:
            raise OptionError("sft_config", f": {name} has no value", "leave it out to have the default")
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(json.dumps(v) if isinstance(v, dict | bool) else str(v) for v in values)]
    parser = HfArgumentParser(SFTConfig)  # type: ignore[arg-type]

    def refuse(message: str) -> None:
        reason = re.sub(r"^argument --(\w+)(?:/--[\w-]+)*", r"\1", message)
        raise OptionError("sft_config", f": {reason}")

    parser.error = refuse  # type: ignore[method-assign,assignment]
    parsed = vars(parser.parse_args(["--output_dir", "unused", *words]))
    return {name: parsed[name] for name in given or ()}


def check_sft_options(config: FinetuneConfig) -> None:
    """Check what only TRL and transformers know of options, before any worker starts.

    Raises:
        ValueError: an option or field that they would refuse.
    """
    extra = parse_sft_config(config.sft_config)
    check_optimizer(config.optim)
    packages = _REPORTERS.get(config.report_to, ())
    if packages and not any(map(importlib.util.find_spec, packages)):
        raise OptionError(
            "report_to", f"{config.report_to} needs a package: pip install {packages[0]}, on every node"
        )
    try:
        get_scheduler(
            config.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0),
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=_read_kwargs(extra.get("lr_scheduler_kwargs")),
        )
    except (ValueError, TypeError) as error:
        raise OptionError("lr_scheduler_type", f"{config.lr_scheduler_type}: {error}") from error


def _read_kwargs(value: Any) -> dict[str, Any] | None:
    return json.loads(value) if isinstance(value, str) else value
