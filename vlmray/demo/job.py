"""The whole story in one command: what the built-in model cannot do, learning it, and what came of it.

    infer (base) -> finetune (LoRA on one family) -> infer (base and adapter) -> Comparison -> report.html

Everything runs through the jobs that anyone would use. The charts that are answered are of a split that
training does not see.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlmray.builtin.charts import ChartsConfig, ChartsSource
from vlmray.builtin.models import BUILTIN, trained_charts
from vlmray.builtin.questions import FAMILIES
from vlmray.config import DemoConfig, FinetuneConfig, InferConfig
from vlmray.demo.comparison import choose_changed, compare
from vlmray.demo.report import ComparisonReport, render_comparison_html
from vlmray.errors import OptionError
from vlmray.finetune.job import run_finetune
from vlmray.finetune.plan import plan_finetune
from vlmray.finetune.report import plot_curves
from vlmray.finetune.results import TrainingReport
from vlmray.inference.job import run_inference
from vlmray.inference.plan import plan_inference
from vlmray.reports.errors import group_errors
from vlmray.reports.gallery import GalleryItem
from vlmray.reports.page import Fact
from vlmray.reports.text import format_duration
from vlmray.schema import Row
from vlmray.storage.run_folder import RunFolder

_TRAINED = trained_charts()
"""Its families are asked along in training: taught one family alone, the model would forget the others."""

_SEED = 2026
"""Of the charts, which the built-in model has not seen in training: those had another."""

_BATCH_SIZE = 16
_SHARE = 8  # questions of the family that is taught for one of each family that is known
_BASE, _TUNED = "base", "base + LoRA"


def run_demo(config: DemoConfig) -> ComparisonReport:
    """Answer, train, answer again, and write the report.

    Raises:
        ValueError: an option does not fit, or the output folder holds something else.
        InferenceError, FinetuneError: a job failed after it started.
    """
    if config.family not in FAMILIES:
        raise OptionError("family", f"{config.family!r} is unknown", f"known: {', '.join(FAMILIES)}")
    started = time.perf_counter()
    _say(f"1/3  {BUILTIN} answers {config.num_charts} charts, a question of every family each")
    before = _answer(config, "base", adapter=None)
    _say(f"2/3  LoRA learns {config.family!r} on charts of another split")
    training = _train(config)
    _say("3/3  the same charts, with the adapter")
    after = _answer(config, "tuned", adapter=f"{config.output_dir}/lora/adapter")
    report = ComparisonReport(
        title=f"What LoRA taught {BUILTIN}: {config.family}",
        comparison=compare(before, after, names=(_BASE, _TUNED), metric="exact_match"),
        focus=config.family,
        facts=_facts(training, time.perf_counter() - started),
        plots=tuple(plot_curves(training)),
        gallery=tuple(_gallery(config, before, after)),
        options=dataclasses.asdict(config),
    )
    RunFolder.create(config.output_dir).write_text("report.html", render_comparison_html(report))
    return report


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def _charts(num_charts: int, families: Sequence[str]) -> ChartsConfig:
    """Return charts that look as those of training did, with a question of every family about each."""
    return dataclasses.replace(
        _TRAINED, num_rows=num_charts * len(families), questions_per_image=len(families), seed=_SEED,
        family=",".join(families),
    )  # fmt: skip


def _answer(config: DemoConfig, folder: str, adapter: str | None) -> list[Row]:
    """Answer the held-out charts, and return the result rows."""
    run = plan_inference(
        InferConfig(
            model_id=BUILTIN,
            adapter=adapter,
            dataset_name=_charts(config.num_charts, FAMILIES).name,
            sample_slices="[:]",
            max_new_tokens=48,
            batch_size=32,
            output_dir=f"{config.output_dir}/{folder}",
            output_format="parquet",
            overwrite=config.overwrite,
            log_level=config.log_level,
        )
    )
    summary = run_inference(run)
    rows = run.folder.read_results().to_pylist()
    for group in group_errors(rows):
        print(f"{group.num_rows} rows failed: {group.cause}")
    print(f"{summary.num_answered:,} answers, {format_duration(summary.elapsed_s)}")
    return rows


def _train(config: DemoConfig) -> TrainingReport:
    folder = f"{config.output_dir}/lora"
    families = (config.family,) * _SHARE + _TRAINED.families
    run = plan_finetune(
        FinetuneConfig(
            model_id=BUILTIN,
            dataset_name=_charts(config.max_steps * _BATCH_SIZE, families).name,
            max_turns=len(families),
            num_workers=1,
            per_device_train_batch_size=_BATCH_SIZE,
            max_steps=config.max_steps,
            learning_rate=1e-3,
            lora_r=32,
            lora_alpha=64,
            lora_dropout=0.0,
            eval_split="validation",
            eval_slices="[:64]",
            eval_samples=64,
            eval_steps=max(1, config.max_steps // 3),
            max_new_tokens=48,
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


def _facts(training: TrainingReport, elapsed_s: float) -> tuple[Fact, ...]:
    share = training.num_trainable / training.num_parameters
    return (
        Fact("charts trained on", f"{training.num_samples:,}", f"{_SHARE} new questions about each"),
        Fact("parameters trained", f"{training.num_trainable:,}", f"{100 * share:.1f} % of all"),
        Fact("training", format_duration(training.elapsed_s)),
        Fact("elapsed", format_duration(elapsed_s), "all three steps"),
    )


def _gallery(config: DemoConfig, before: Sequence[Row], after: Sequence[Row]) -> list[GalleryItem]:
    """Show changed answers with what was said before, their images read again from the source."""
    earlier = {row["sample_id"]: row for row in before}
    chosen = choose_changed(before, after, config.family)
    source = ChartsSource(_charts(config.num_charts, FAMILIES).name, "test")
    images = source.read([row["row_index"] for row in chosen], ["image"])
    return [
        dataclasses.replace(
            GalleryItem.from_row(row, image["image"]),
            beside=(("Without LoRA", earlier[row["sample_id"]]["prediction"] or ""),),
        )
        for row, image in zip(chosen, images, strict=True)
    ]
