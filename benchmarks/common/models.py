"""Qwen2.5-VL of several sizes with random weights: the work of the real ones without their files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

RANDOM: dict[str, dict[str, Any]] = {
    "random-toy": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "tie_word_embeddings": True,
    },
    "random-132m": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "random-3b": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "random-7b": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Language models; those of 3 and 7 billion parameters have the shapes of the released ones."""

_REAL_TOWER = {
    "hidden_size": 1280, "depth": 32, "num_heads": 16, "intermediate_size": 3420,
    "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
_TOWERS = {
    "random-toy": {
        "hidden_size": 64, "depth": 2, "num_heads": 2, "intermediate_size": 128, "fullatt_block_indexes": [1]
    },
    "random-132m": {
        "hidden_size": 512, "depth": 8, "num_heads": 8, "intermediate_size": 1408,
        "fullatt_block_indexes": [3, 7],
    },
}  # fmt: skip
_SIDE_FILES = ("*token*.json", "*vocab*", "merges.txt", "chat_template*", "*preprocessor_config.json")


def make_random_model(name: str, processor: str, *, device: str = "cpu", dtype: str = "float32") -> Any:
    """Make a model with random weights, drawn where they stay.

    Args:
        name: One of `RANDOM`.
        processor: Folder of a tokenizer and its Qwen2.5-VL's config; the model reads what they write.
        device: `cpu` or `cuda`.
        dtype: Of the weights.

    Returns:
        The model in eval mode. It answers greedily and without penalty.
    """
    found = json.loads((Path(processor) / "config.json").read_text())
    shape = RANDOM[name]
    half_head = shape["hidden_size"] // shape["num_attention_heads"] // 2
    text = {
        **shape, "vocab_size": found.get("text_config", found)["vocab_size"],
        "max_position_embeddings": 128_000,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6,
            "mrope_section": [half_head // 4, half_head * 3 // 8, half_head * 3 // 8],
        },
    }  # fmt: skip
    vision = {**_TOWERS.get(name, _REAL_TOWER), "out_hidden_size": shape["hidden_size"], "window_size": 112}
    special = {key: value for key, value in found.items() if key.endswith("_token_id")}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=shape["tie_word_embeddings"], **special
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model: Any = Qwen2_5_VLForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    generation = json.loads((Path(processor) / "generation_config.json").read_text())
    kept = {key: value for key, value in generation.items() if key.endswith("_token_id")}
    model.generation_config.update(**kept, do_sample=False, repetition_penalty=1.0)
    return model


def build_random_model(
    name: str, processor: str, path: Path, dtype: str = "float32", device: str = "cpu"
) -> str:
    """Write a model with random weights beside the files of a tokenizer and processor; return the path.

    Args:
        name: One of `RANDOM`.
        processor: Folder with the files of a Qwen2.5-VL, weights apart.
        path: Where to.
        dtype: Of the weights.
        device: Where they are drawn.
    """
    path.mkdir(parents=True, exist_ok=True)
    for pattern in _SIDE_FILES:
        for file in Path(processor).glob(pattern):
            shutil.copy(file, path)
    make_random_model(name, processor, device=device, dtype=dtype).save_pretrained(path)
    return str(path)
