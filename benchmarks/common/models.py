"""Qwen2.5-VL of several sizes with random weights: the work of the real ones without their files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

RANDOM = {
    "random-132m": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "random-3b": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2,
    },
    "random-7b": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}  # fmt: skip
SMALL_VISION = {
    "hidden_size": 512, "depth": 8, "num_heads": 8, "intermediate_size": 1408,
    "fullatt_block_indexes": [3, 7],
}  # fmt: skip
"""Of the smallest one; the others have the real tower."""


def build_random_model(name: str, processor: str, path: Path, dtype: str = "float32") -> str:
    """Write a Qwen2.5-VL with random weights beside the files of a real one's tokenizer and processor.

    Args:
        name: One of `RANDOM`.
        processor: Folder with the files of the real one, weights apart.
        path: Where to; must not exist.
        dtype: Of the weights.
    """
    shutil.copytree(processor, path)
    config = json.loads((path / "config.json").read_text())
    text = config.setdefault("text_config", {k: v for k, v in config.items() if k != "vision_config"})
    text |= RANDOM[name]
    width = text["hidden_size"] // text["num_attention_heads"] // 2
    text |= {
        "max_window_layers": text["num_hidden_layers"], "tie_word_embeddings": True,
        "layer_types": ["full_attention"] * text["num_hidden_layers"], "use_sliding_window": False,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6,
            "mrope_section": [width // 4, width * 3 // 8, width * 3 // 8],
        },
    }  # fmt: skip
    text.pop("rope_scaling", None)
    small = SMALL_VISION if name == "random-132m" else {}
    vision = config["vision_config"] | small | {"out_hidden_size": text["hidden_size"]}
    kept = {key: config[key] for key in config if key.endswith("_token_id")}
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **kept)
    )
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(path)
    generation = json.loads((path / "generation_config.json").read_text())
    generation |= {"repetition_penalty": 1.0, "do_sample": False}  # greedy, the same in all ways
    for key in ("temperature", "top_p", "top_k"):
        generation.pop(key, None)
    (path / "generation_config.json").write_text(json.dumps(generation))
    return str(path)
