"""The whole story in one command: what the built-in model cannot do, learning it, and what that is worth.

    finetune (LoRA on one family) -> benchmark (the model without and with the adapter) -> report.html

Everything runs through the jobs that anyone would use. The charts of the comparison are of a split that
training does not see.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlmray.benchmark.job import run_benchmark
from vlmray.benchmark.plan import plan_benchmark
from vlmray.benchmark.verdicts import Results
from vlmray.builtin.models import BUILTIN, trained_charts
from vlmray.builtin.questions import FAMILIES
from vlmray.config import BenchmarkConfig, DemoConfig, FinetuneConfig
from vlmray.demo.report import COMPARISON, TRAINING, DemoReport, render_demo_html
from vlmray.errors import OptionError
from vlmray.finetune.job import run_finetune
from vlmray.finetune.plan import plan_finetune
from vlmray.finetune.results import ADAPTER, TrainingReport
from vlmray.storage.run_folder import RunFolder

_TRAINED = trained_charts()
"""Its families are asked along in training: taught one family alone, the model would forget the others."""

_SEED = 2026
"""Of the charts, which the built-in model has not seen in training: those had another."""

_BATCH_SIZE = 8
_SHARE = 8  # questions of the family that is taught for one of each family that is known
_MAX_NEW_TOKENS = 48


def run_demo(config: DemoConfig) -> DemoReport:
    """Train, ask the model without and with what it learned, and write the report.

    Raises:
        ValueError: an option does not fit, or the output folder holds something else.
        InferenceError, FinetuneError: a job failed after it started.
    """
    if config.family not in FAMILIES:
        raise OptionError("family", f"{config.family!r} is unknown", f"known: {', '.join(FAMILIES)}")
    started = time.perf_counter()
    _say(f"1/2  {BUILTIN} learns {config.family!r}: LoRA, on charts of the train split")
    training = _train(config)
    _say(
        f"2/2  {BUILTIN} without the adapter, then with it, answers {config.num_charts} charts of the test "
        f"split,\n     {len(FAMILIES)} questions about each"
    )
    report = DemoReport(
        config=config, training=training, results=_compare(config), elapsed_s=time.perf_counter() - started
    )
    RunFolder.create(config.output_dir).write_text("report.html", render_demo_html(report))
    return report


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def _charts(num_charts: int, families: Sequence[str]) -> str:
    """Name charts that look as those of training did, with a question of every family about each."""
    return dataclasses.replace(
        _TRAINED, num_rows=num_charts * len(families), questions_per_image=len(families), seed=_SEED,
        family=",".join(families),
    ).name  # fmt: skip


def _train(config: DemoConfig) -> TrainingReport:
    folder = f"{config.output_dir}/{TRAINING}"
    families = (config.family,) * _SHARE + _TRAINED.families
    run = plan_finetune(
        FinetuneConfig(
            model_id=BUILTIN,
            dataset_name=_charts(config.max_steps * _BATCH_SIZE, families),
            max_turns=len(families),
            num_workers="1",
            per_device_train_batch_size=_BATCH_SIZE,
            max_steps=config.max_steps,
            learning_rate=1e-3,
            lora_r=32,
            lora_alpha=64,
            lora_dropout=0.0,
            eval_split="validation",
            eval_slices="[:64]",
            eval_samples=64,
            eval_steps=-(-config.max_steps // 3),
            max_new_tokens=_MAX_NEW_TOKENS,
            bf16=_has_fast_bfloat16() or None,
            output_dir=folder,
            resume=(Path(folder) / "options.json").is_file() and not config.overwrite,
            overwrite=config.overwrite,
            log_level=config.log_level,
        )
    )
    return run_finetune(run)


def _has_fast_bfloat16() -> bool:
    """Tell whether this CPU multiplies bfloat16 matrices in hardware; others are slower at them."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16"))


def _compare(config: DemoConfig) -> Results:
    """Ask both about the held-out charts, what an earlier run left unasked."""
    adapter = f"{config.output_dir}/{TRAINING}/{ADAPTER}"
    return run_benchmark(
        plan_benchmark(
            BenchmarkConfig(
                models=f"base={BUILTIN},tuned={BUILTIN}+{adapter}",
                dataset_name=_charts(config.num_charts, FAMILIES),
                metrics="exact_match",
                engine="transformers",
                offline=True,
                max_new_tokens=_MAX_NEW_TOKENS,
                batch_size=32,
                output_dir=f"{config.output_dir}/{COMPARISON}",
                overwrite=config.overwrite,
                log_level=config.log_level,
            )
        )
    )
