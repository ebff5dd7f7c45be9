"""Adapters of every kind that PEFT's LoRA can save, with random weights that truly change answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText

from helpers.engines import DEVICE, generate_alone, load
from vlmray.models.lora import LANGUAGE_TARGETS, MERGER_TARGETS, VISION_TARGETS
from vlmray.schema import GenerationRequest

MIXING: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank-pattern": {"rank_pattern": {"q_proj": 2, "down_proj": 8}, "alpha_pattern": {"v_proj": 32}},
    "lm_head-lora": {"target_modules": ["q_proj", "lm_head"]},
    "few-layers": {"target_modules": ["language_model.layers.1.mlp.up_proj"], "init_lora_weights": False},
    "excluded": {"exclude_modules": r".*\.q_proj"},
}
"""What PEFT adds to rows of the language model: these may share a forward pass."""

APART: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora-vision": {"use_dora": True, "target_modules": VISION_TARGETS},
    "bias-lora_only": {"bias": "lora_only"},
    "bias-all": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "merger": {"modules_to_save": ["merger"]},
    "saved-patch_embed": {"modules_to_save": ["patch_embed"]},
    "saved-norm": {"modules_to_save": ["input_layernorm", "norm"]},
    "saved-lm_head": {"modules_to_save": ["lm_head"]},
    "saved-embed_tokens": {"modules_to_save": ["embed_tokens"]},
    "saved-both-embeddings": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [1, 7, 30, 31, 32]}},
    "vision": {"target_modules": VISION_TARGETS},
    "merger-lora": {"target_modules": MERGER_TARGETS},
    "patch_embed-lora": {"target_modules": ["patch_embed.proj", "v_proj"]},
    "embed_tokens-lora": {"target_modules": ["embed_tokens"]},
    "both-embeddings-lora": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "parameters": {"target_modules": [], "target_parameters": ["up_proj.weight"]},
}
"""What goes into the base's place, or is met by something else than rows."""


def build_adapter(folder: Path, base: Path, *, seed: int = 0, **options: Any) -> Path:
    """Write a random adapter; options are those of PEFT's `LoraConfig`."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_pretrained(base)
    config = {"r": 4, "lora_alpha": 8, "target_modules": LANGUAGE_TARGETS, "task_type": "CAUSAL_LM"} | options
    adapted = get_peft_model(model, LoraConfig(**config))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:  # what would have been trained
                scale = 0.5 * float(parameter.std()) if parameter.numel() > 1 else 0.0
                parameter.add_(torch.randn_like(parameter) * (scale or 0.3))
    adapted.save_pretrained(folder)
    return folder


def answer_by_peft(
    base: Path, adapter: Path | None, processor: Any, rows: list[GenerationRequest]
) -> list[str]:
    """Answer rows one by one by a fresh base with one adapter, without anything of this package."""
    model = load(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).to(DEVICE)
    return [generate_alone(model, processor, row) for row in rows]
