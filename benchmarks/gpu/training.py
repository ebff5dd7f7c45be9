"""How fast is LoRA training at the real shapes, beside plain TRL and beside what the card could do?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from benchmarks.common.limit import Work, count_training_work, measure_products
from benchmarks.gpu.setting import Figures, Setting
from benchmarks.training import EPOCHS, rates_of, train_alone, train_plainly
from vlmray.config import FinetuneConfig
from vlmray.engines.transformers.memory import empty_cache
from vlmray.finetune.plan import open_training_data
from vlmray.training.collator import DataCollatorForVLMSFT
from vlmray.training.run import TrainingData, TrainingRun
from vlmray.training.samples import open_images, to_feature


def measure(setting: Setting) -> Figures:
    """Train the same batches by TRL alone and by the job's worker, for two epochs."""
    run, data = _plan(setting, num_train_epochs=2)
    rates, losses = {}, {}
    for name, train in (("plain_trl", train_plainly), ("worker", train_alone)):
        _forget_peak()
        times, losses[name] = train(run, data)
        rates[name] = rates_of(times, run)
        for epoch, rate in rates[name].items():
            yield f"{name}_{epoch.replace(' ', '_')}_samples_per_s", rate
        yield from _peak(name)
    yield "times_plain_trl", rates["worker"][EPOCHS[0]] / rates["plain_trl"][EPOCHS[0]]
    yield "times_plain_trl_later_epochs", rates["worker"][EPOCHS[1]] / rates["plain_trl"][EPOCHS[1]]
    pairs = zip(losses["worker"], losses["plain_trl"], strict=True)
    yield "first_losses", [losses["plain_trl"][0], losses["worker"][0]]
    yield "largest_loss_difference", max(abs(one - other) for one, other in pairs)
    yield from _compare_with_card(setting, data, rates["worker"][EPOCHS[0]])


def measure_quantized(setting: Setting, *, quantization: str) -> Figures:
    """Train on a base that bitsandbytes quantized.

    Args:
        setting: Says on what.
        quantization: `4bit` or `8bit`.
    """
    yield from _measure_alone(setting, quantization=quantization)


def measure_attention(setting: Setting, *, attn_implementation: str) -> Figures:
    """Train with another attention kernel.

    Args:
        setting: Says on what.
        attn_implementation: As transformers names it.
    """
    yield from _measure_alone(setting, attn_implementation=attn_implementation)


def _measure_alone(setting: Setting, **options: Any) -> Figures:
    run, data = _plan(setting, num_train_epochs=1, **options)
    _forget_peak()
    times, losses = train_alone(run, data)
    first = len(times) // 4
    trained = run.num_samples_of(len(times)) - run.num_samples_of(first + 1)
    yield "samples_per_s", trained / (times[-1] - times[first])
    yield from _peak("worker")
    yield "losses", losses
    if not all(map(math.isfinite, losses)):
        raise RuntimeError("a loss is not a number")


def _plan(setting: Setting, **options: Any) -> tuple[TrainingRun, TrainingData]:
    config = FinetuneConfig(
        model_id=setting.model_folder(setting.scale.large), dataset_name=setting.dataset_name,
        dataset_split="test", sample_slices=f"[:{setting.scale.num_samples}]", num_workers="1",
        per_device_train_batch_size=setting.scale.batch_size, logging_steps=1, save_steps=10**6,
        lora_dropout=0.0, max_pixels=setting.scale.max_pixels, **options,
    )  # fmt: skip
    data = open_training_data(config)
    return TrainingRun.of(config, data, num_workers=1), data


def _compare_with_card(setting: Setting, data: TrainingData, rate: float) -> Iterator[tuple[str, Any]]:
    """Yield tokens per second, and what share of the rate of matrix products the work of an epoch is."""
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(setting.model_folder(setting.scale.large))
        work = Work.of(AutoModelForImageTextToText.from_config(config))
    samples = list(_count_tokens(setting, data))
    num_tokens = sum(tokens for tokens, _, _ in samples)
    products = measure_products(setting.device, setting.dtype)
    again = sum(work.read(tokens, tokens / 2) for tokens, _, _ in samples)
    epochs_per_s = rate / len(samples)
    yield "tokens_per_s", num_tokens * epochs_per_s
    yield "tokens_per_sample", num_tokens / len(samples)
    needed = count_training_work(work, samples)
    yield "work_tflop_per_sample", needed / len(samples) / 1e12
    yield "share_of_products_rate", needed * epochs_per_s / products
    yield "share_of_products_rate_with_recomputation", (needed + again) * epochs_per_s / products


def _count_tokens(setting: Setting, data: TrainingData) -> Iterator[tuple[int, int, int]]:
    """Yield the tokens of each sample in all, those of its image, and those with a label."""
    processor = setting.load_processor()
    processor.tokenizer.padding_side = "right"
    collator = DataCollatorForVLMSFT(processor)
    features: Sequence[Any] = [
        to_feature(row) for row in open_images(data.train.read(range(len(data.train))))
    ]
    for feature in features:
        batch = collator([feature])
        ids, labels = batch["input_ids"], batch["labels"]
        yield ids.numel(), int((ids == processor.image_token_id).sum()), int((labels != -100).sum())


def _forget_peak() -> None:
    empty_cache()  # the trainer before this one is garbage by now
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak(name: str) -> Figures:
    if torch.cuda.is_available():
        yield f"{name}_peak_gib", torch.cuda.max_memory_allocated() / 2**30
