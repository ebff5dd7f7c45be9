"""What no implementation can do without: the floating-point work of answering questions about images.

Each distinct image goes through the vision tower once, each distinct beginning (system prompt and image)
through the language model once, each question and answer token once, and only answer tokens need logits. A
token costs two operations for each weight of the linear layers it passes, and 4 x width x context for
attention. Normalisation, softmax, image resizing and all else count as free.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from vlmray.engines.linear import multiply
from vlmray.engines.transformers import TransformersEngine
from vlmray.schema import GenerationRequest


def count_work(engine: TransformersEngine, requests: Sequence[GenerationRequest]) -> float:
    """Return the floating-point operations that cannot be avoided; the module's docstring has the formula."""
    model, config = engine.model, engine.model.config
    text, vision = config.text_config, config.vision_config
    merge = vision.spatial_merge_size**2
    in_blocks = num_weights(model.model.visual.blocks) + num_weights(model.model.visual.patch_embed)
    in_merger = num_weights(model.model.visual.merger)
    in_text = num_weights(model.model.language_model.layers)
    head = model.lm_head.weight.numel()
    width = (
        text.num_hidden_layers
        * text.num_attention_heads
        * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    )
    window = (vision.window_size // vision.patch_size) ** 2
    num_full = len(vision.fullatt_block_indexes)
    work = 0.0
    seen: dict[tuple[Any, ...], int] = {}
    for completion, request in zip(engine.generate(requests), requests, strict=True):
        num_prompt, num_answer = completion.num_prompt_tokens, completion.num_completion_tokens
        before, _, after = completion.prompt.rpartition(engine.processor.image_token)
        num_tail = len(engine.processor.tokenizer(after)["input_ids"])
        key = (before, *request.images)
        if key not in seen:
            seen[key] = num_head = num_prompt - num_tail
            num_visual = sum(engine._count_visual_tokens(image) for image in request.images)
            num_patches = num_visual * merge
            work += 2 * (in_blocks * num_patches + in_merger * num_visual)
            context = num_full * num_patches + (vision.depth - num_full) * min(window, num_patches)
            work += 4 * vision.hidden_size * num_patches * context
            work += 2 * in_text * num_head + 4 * width * num_head * num_head / 2
        num_new = num_tail + num_answer - 1  # the last token is not read
        work += 2 * in_text * num_new + 4 * width * num_new * (num_prompt + num_answer / 2)
        work += 2 * head * num_answer
    return work


def num_weights(module: torch.nn.Module) -> int:
    """Count the weights of matrices: what a token is multiplied by."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)


def measure_products(device: str, dtype: str) -> float:
    """Return the rate of large matrix products, operations per second: the best of several."""
    size = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(size, size).to(device, getattr(torch, dtype)) for _ in range(2))
    ways = [torch.mm, multiply] if device == "cpu" and torch.backends.mkldnn.is_available() else [torch.mm]
    best = float("inf")
    for way in 20 * ways:
        started = time.perf_counter()
        way(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
