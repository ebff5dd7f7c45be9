"""Does the automatic budget fit the memory, and what happens where it does not?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image

from benchmarks.common.models import make_random_model
from benchmarks.gpu.setting import Figures, Setting
from vlmray.dataset.prompts import format_qwen_vl_messages
from vlmray.engines.transformers.attention import pack_attention
from vlmray.engines.transformers.engine import TransformersEngine
from vlmray.engines.transformers.memory import bytes_per_token, empty_cache, is_out_of_memory
from vlmray.models.families import family_of
from vlmray.schema import GenerationRequest

_SIDE = 25 * 28  # pixels: 625 visual tokens
_NUM_HALVED = 24
_LEFT = 0.3  # share of what a batch takes that is left of the memory, where it shall run out


def measure(setting: Setting) -> Figures:
    """Fill the budget, exceed it, and take memory away."""
    model = make_random_model(
        setting.scale.large, setting.processor, device=setting.device, dtype=setting.dtype
    )
    family_of(model.config).prepare(model)
    pack_attention(model)
    processor = setting.load_processor()
    on_gpu = setting.device == "cuda"
    engine = TransformersEngine(model, processor, batch_size=10**6)
    budget = engine.batcher.max_batch_tokens
    per_token = bytes_per_token(model.config, model.dtype.itemsize)
    yield "max_batch_tokens", budget
    yield "estimated_bytes_per_token", per_token
    for factor in setting.scale.budget_factors:
        before = _forget_peak(on_gpu)
        free = torch.cuda.mem_get_info()[0] if on_gpu else 0
        engine.batcher.max_batch_tokens = asked = int(factor * budget)
        requests = _fill(engine, asked)
        _check(engine.generate(requests))
        yield f"{factor:g}_budget_halved", engine.batcher.max_batch_tokens < asked
        if on_gpu:
            taken = torch.cuda.max_memory_allocated() - before
            yield f"{factor:g}_budget_peak_share_of_free", taken / free
            yield f"{factor:g}_budget_bytes_per_token", taken / asked
        if engine.batcher.max_batch_tokens < asked:
            break
    engine.batcher.max_batch_tokens = budget
    requests = _fill(engine, budget)[:_NUM_HALVED]
    before = _forget_peak(on_gpu)
    expected = _check(engine.generate(requests))
    taken = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    with _little_memory(engine, int(_LEFT * taken)) as failures:
        found = _check(engine.generate(requests))
    yield "num_out_of_memory", len(failures)
    yield "halved_after", engine.batcher.max_batch_tokens < budget
    yield "equal_texts_after", sum(map(str.__eq__, expected, found)) / len(expected)
    engine.close()
    if not failures:
        raise RuntimeError("memory did not run out, so nothing was learned of that")


def _forget_peak(on_gpu: bool) -> int:
    """Begin to watch for a peak; return what is allocated now."""
    if not on_gpu:
        return 0
    empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _fill(engine: TransformersEngine, num_tokens: int) -> list[GenerationRequest]:
    """Make requests about images of their own that together have nearly so many tokens."""

    def make(number: int) -> GenerationRequest:
        image = Image.new("RGB", (_SIDE, _SIDE), (number % 256, number // 256, 99))
        messages = format_qwen_vl_messages(f"What is the value of bar {number}?", 1)
        return GenerationRequest(request_id=str(number), messages=messages, images=[image], max_new_tokens=8)

    (row,) = engine.prepare([make(0)]).rows  # type: ignore[attr-defined]
    return [make(number) for number in range(max(2, num_tokens // (row.num_tokens + 8)))]


def _check(completions: list[Any]) -> list[str]:
    errors = [completion.error for completion in completions if completion.error]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(completions)} rows failed, the first: {errors[0]}")
    return [completion.text for completion in completions]


@contextmanager
def _little_memory(engine: TransformersEngine, num_bytes: int) -> Iterator[list[str]]:
    """Leave an engine so little memory; yield the failures that it meets.

    On a GPU torch is held to a share of the card. A CPU has no such bound, so there a failure is raised for
    every batch of more than a few rows.
    """
    failures: list[str] = []
    forward, on_gpu = engine.forward, torch.cuda.is_available()
    run = forward.run

    def watched(rows: list[Any], listener: Any) -> None:
        try:
            if not on_gpu and len(rows) > _LEFT * _NUM_HALVED:
                raise torch.OutOfMemoryError("CUDA out of memory")
            run(rows, listener)
        except Exception as error:
            if is_out_of_memory(error):
                failures.append(str(error)[:300])
            raise

    if on_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + num_bytes) / total)
    forward.run = watched  # type: ignore[method-assign]
    try:
        yield failures
    finally:
        del forward.run
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)
