"""What no implementation can do without: the floating-point work of answering questions about images.

Each distinct image goes through the vision tower once, each distinct beginning (system prompt and image)
through the language model once, each question and answer token once, and only answer tokens need logits. A
token costs two operations for each weight of the linear layers it passes, and 4 x width x context for
attention. Training a LoRA adapter passes the language model twice: forward, and backward to the activations;
frozen weights have no gradient, and what checkpoints compute again could be kept. Normalisation, softmax,
image resizing and all else count as free.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlmray.engines.transformers.batching import count_visual_tokens
from vlmray.engines.transformers.engine import TransformersEngine
from vlmray.engines.transformers.linear import multiply
from vlmray.schema import Completion, GenerationRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Weights and widths of a Qwen2.5-VL, from which its floating-point operations follow."""

    patch_weights: int
    merger_weights: int
    text_weights: int
    head_weights: int
    text_width: int
    """Of the queries of all layers."""

    vision_width: int
    num_full: int
    """Vision layers that attend to whole images."""

    num_windowed: int
    window: int
    """Patches of a window."""

    merge: int
    """Patches of a token."""

    @classmethod
    def of(cls, model: Any) -> Work:
        """Read them off a model, which may be on the meta device."""
        text, vision = model.config.text_config, model.config.vision_config
        tower = model.model.visual
        num_full = len(vision.fullatt_block_indexes)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            patch_weights=_num_weights(tower.blocks) + _num_weights(tower.patch_embed),
            merger_weights=_num_weights(tower.merger),
            text_weights=_num_weights(model.model.language_model.layers),
            head_weights=model.lm_head.weight.numel(),
            text_width=text.num_hidden_layers * text.num_attention_heads * head_dim,
            vision_width=vision.hidden_size,
            num_full=num_full,
            num_windowed=vision.depth - num_full,
            window=(vision.window_size // vision.patch_size) ** 2,
            merge=vision.spatial_merge_size**2,
        )

    def see(self, num_visual: int) -> float:
        """Operations of the vision tower for an image of so many tokens."""
        num_patches = num_visual * self.merge
        context = self.num_full * num_patches + self.num_windowed * min(self.window, num_patches)
        linear = 2 * (self.patch_weights * num_patches + self.merger_weights * num_visual)
        return linear + 4 * self.vision_width * num_patches * context

    def read(self, num_tokens: int, context: float) -> float:
        """Operations of the language model for so many tokens, which see `context` tokens on average."""
        return 2 * self.text_weights * num_tokens + 4 * self.text_width * num_tokens * context

    def score(self, num_tokens: int) -> float:
        """Operations for the logits of so many tokens."""
        return 2 * self.head_weights * num_tokens


def count_work(
    engine: TransformersEngine,
    requests: Sequence[GenerationRequest],
    completions: Sequence[Completion] | None = None,
) -> float:
    """Return the floating-point operations that cannot be avoided; the module's docstring has the formula.

    Args:
        engine: Of the model; knows how many tokens images have.
        requests: What was asked.
        completions: What was answered; asked again where it is not given.
    """
    work = Work.of(engine.model)
    total = 0.0
    seen: dict[tuple[Any, ...], int] = {}
    for completion, request in zip(completions or engine.generate(requests), requests, strict=True):
        num_prompt, num_answer = completion.num_prompt_tokens, completion.num_completion_tokens
        before, _, after = completion.prompt.rpartition(engine.processor.image_token)
        num_tail = len(engine.processor.tokenizer(after)["input_ids"])
        key = (before, *request.images)
        if key not in seen:
            seen[key] = num_head = num_prompt - num_tail
            total += work.see(sum(count_visual_tokens(engine.processor, image) for image in request.images))
            total += work.read(num_head, num_head / 2)
        total += work.read(num_tail + num_answer - 1, num_prompt + num_answer / 2)  # the last is not read
        total += work.score(num_answer)
    return total


def count_training_work(work: Work, samples: Iterable[tuple[int, int, int]]) -> float:
    """Return the operations of a LoRA step that cannot be avoided, the tower frozen.

    Args:
        work: Of the model.
        samples: Tokens of each sample in all, those of its image, and those with a label.
    """
    return sum(
        work.see(num_visual) + 2 * (work.read(num_tokens, num_tokens / 2) + work.score(num_labels))
        for num_tokens, num_visual, num_labels in samples
    )


def _num_weights(module: torch.nn.Module) -> int:
    """Count the weights of matrices: what a token is multiplied by."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)


def measure_products(device: str, dtype: str) -> float:
    """Return the rate of large matrix products, operations per second: the best of several."""
    size = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(size, size).to(device, getattr(torch, dtype)) for _ in range(2))
    is_plain_cpu = device == "cpu" and dtype == "float32" and torch.backends.mkldnn.is_available()
    ways = [torch.mm, multiply] if is_plain_cpu else [torch.mm]
    best = float("inf")
    for way in 20 * ways:
        started = time.perf_counter()
        way(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
