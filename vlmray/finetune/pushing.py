"""Passing a finished run on: adapter or model, and the merged model, each with its card, to the hub."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarrow.fs import copy_files

from vlmray.builtin.models import BUILTIN
from vlmray.config import FinetuneConfig
from vlmray.dataset.rows import image_keys
from vlmray.dataset.slices import sample_id
from vlmray.dataset.sources import display_name, hub_dataset
from vlmray.finetune.results import ADAPTER, MERGED, MODEL, RECORD, TrainingReport
from vlmray.metrics.significance import Interval, mean_interval
from vlmray.models.source import ModelSource, hub_model
from vlmray.publishing.cards import Facts, code, command_of, write_card
from vlmray.publishing.hub import license_of
from vlmray.publishing.private import public_value
from vlmray.reports.text import format_duration, format_percent
from vlmray.schema import Row
from vlmray.storage.filesystem import open_filesystem
from vlmray.storage.run_folder import RunFolder
from vlmray.storage.scratch import scratch_folder

if TYPE_CHECKING:  # a plan knows Ray
    from huggingface_hub import ModelCardData

    from vlmray.finetune.plan import FinetuneRun

Scored = tuple[float, Interval | None] | None
"""The kept weights' score, with its interval where their answers are there; None without an evaluation."""

CARD = "README.md"

_REWRITTEN = (RECORD, "adapter_config.json", "config.json")
"""Files of ours that name what was loaded, and from where."""

_TITLES = {ADAPTER: "LoRA adapter", MODEL: "Fine-tuned model", MERGED: "Fine-tuned model (LoRA, merged)"}


def push_artifacts(
    run: FinetuneRun, report: TrainingReport, record: Mapping[str, Any], answered: Sequence[Row]
) -> None:
    """Push what the output folder holds.

    Args:
        run: The run, all of it written.
        report: How it went.
        record: What it was made of.
        answered: Evaluation samples as the last evaluation left them.

    Raises:
        PushError: The hub did not take it.
    """
    for kind, repo in run.repos.items():
        card = _write_card(run, report, record, answered, kind)
        with _lying_here(run.folder, kind) as folder:
            files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
            repo.push(
                {name: _public(path) for name, path in files.items() if path.is_file()}
                | {CARD: card.encode()},
                f"{_TITLES[kind]} by vlmray {record['vlmray']}",
            )


def _public(path: Path) -> Path | bytes:
    """Return a file as it is passed on: without the paths of this machine."""
    if path.name not in _REWRITTEN:
        return path
    found = public_value(json.loads(path.read_text(encoding="utf-8")))
    return (json.dumps(found, ensure_ascii=False, indent=2) + "\n").encode()


@contextlib.contextmanager
def _lying_here(folder: RunFolder, name: str) -> Iterator[Path]:
    """Yield where a folder of a run lies on this machine, fetched where it does not."""
    filesystem, root = open_filesystem(folder.uri)
    if folder.is_local:
        yield Path(root) / name
        return
    with scratch_folder() as scratch:
        copy_files(f"{root}/{name}", str(scratch), source_filesystem=filesystem)
        yield scratch


# ---------------------------------------------------------------------------------------------
# The card
# ---------------------------------------------------------------------------------------------


def _write_card(
    run: FinetuneRun, report: TrainingReport, record: Mapping[str, Any], answered: Sequence[Row], kind: str
) -> str:
    score = _score(run, report, answered)
    base = public_value(run.config.model_id)
    return write_card(
        _metadata(run, report, score, kind),
        f"{_TITLES[kind]} of {base} for {_dataset_name(run.config)}",
        f"Trained by vlmray {record['vlmray']}, saved as safetensors, loaded afresh and checked.",
        {
            "Use": _usage(kind, run.repos[kind].repo_id, base, run.config.model_id),
            "Scores": _score_facts(report, score, kind),
            **_training_facts(run, report, record),
            "Checks": {
                check.name: ("passed" if check.passed else "failed") + (check.detail and f": {check.detail}")
                for check in report.checks
            },
            "Versions": {"vlmray": record["vlmray"], **record["versions"]},
            "Command": command_of("finetune", run.config),
        },
    )


def _metadata(run: FinetuneRun, report: TrainingReport, score: Scored, kind: str) -> ModelCardData:
    """Return what the hub reads of a card."""
    from huggingface_hub import EvalResult, ModelCardData

    config, dataset_id = run.config, hub_dataset(run.config.dataset_name)
    metadata = ModelCardData(
        base_model=hub_model(config.model_id),
        datasets=[dataset_id] if dataset_id else None,
        library_name="peft" if kind == ADAPTER else "transformers",
        license=license_of(config.model_id, "model", ModelSource.find(config.model_id).folder),
        pipeline_tag="image-text-to-text",
        tags=["vlmray", "visual-question-answering", *(["lora"] if config.use_peft else [])],
    )
    if score is not None:
        metadata.model_name = run.repos[kind].repo_id.partition("/")[2]
        metadata.eval_results = [
            EvalResult(
                task_type="visual-question-answering", dataset_type=dataset_id or "other",
                dataset_name=_dataset_name(config), dataset_split=_eval_split(config),
                metric_type=str(report.metric), metric_value=score[0],
            )
        ]  # fmt: skip
    return metadata


def _training_facts(run: FinetuneRun, report: TrainingReport, record: Mapping[str, Any]) -> dict[str, Facts]:
    """Return what was trained, on what and how."""
    config, data = run.config, run.data.train
    evaluated_on = f"{_eval_split(config)}, rows {config.eval_slices or '[:]'}"
    return {
        "Data": {
            "dataset": _dataset_name(config),
            "split": config.dataset_split,
            "rows": config.sample_slices,
            "samples trained on": report.num_samples,
            "samples left out": report.num_failed,
            "evaluated on": evaluated_on if config.evaluates else None,
        },
        "Prompt": {
            "system": data.system_prompt,
            "question": data.spec.prompt_template,
            "pixels of an image": _pixels(config),
            "chat template": "in chat_template.jinja" if config.chat_template else "that of the base",
        },
        "Training": {
            "method": _method(config),
            "adapted": ", ".join(record["targets"]) if config.use_peft else None,
            "parameters trained": f"{report.num_trainable:,} of {report.num_parameters:,}",
            "steps": f"{report.num_steps:,} of {run.training.samples_per_step:,} samples",
            "learning rate": f"{config.learning_rate:g}, {config.lr_scheduler_type}",
            "seed": config.seed,
            "took": format_duration(report.elapsed_s),
        },
    }


def _eval_split(config: FinetuneConfig) -> str:
    return config.eval_split or config.dataset_split


def _dataset_name(config: FinetuneConfig) -> str:
    return display_name(str(public_value(config.dataset_name)), config.dataset_config)


def _usage(kind: str, repo_id: str, base: str, model_id: str) -> str:
    """Show how it is loaded."""
    lines = ["from transformers import AutoModelForImageTextToText, AutoProcessor", ""]
    if kind != ADAPTER:
        lines += [f'model = AutoModelForImageTextToText.from_pretrained("{repo_id}")']
    elif model_id == BUILTIN:
        lines[:1] = [
            "from peft import PeftModel",
            lines[0],
            "from vlmray.builtin.models import BUILTIN_FOLDER",
        ]
        lines += ["base = AutoModelForImageTextToText.from_pretrained(BUILTIN_FOLDER)"]
    else:
        lines[:1] = ["from peft import PeftModel", lines[0]]
        lines += [f'base = AutoModelForImageTextToText.from_pretrained("{base}")']
    if kind == ADAPTER:
        lines += [f'model = PeftModel.from_pretrained(base, "{repo_id}")']
    lines += [f'processor = AutoProcessor.from_pretrained("{repo_id}")']
    return code("\n".join(lines), "python")


def _method(config: FinetuneConfig) -> str:
    if not config.use_peft:
        return "all parameters" + (" but those of the vision tower" if config.freeze_vision else "")
    base = "" if config.quantization == "none" else f", on the base in {config.quantization}"
    return f"LoRA, rank {config.lora_r}, alpha {config.lora_alpha}, dropout {config.lora_dropout:g}{base}"


def _pixels(config: FinetuneConfig) -> str | None:
    low, high = config.min_pixels, config.max_pixels
    bounds = ((low, "at least"), (high, "at most"))
    return ", ".join(f"{words} {bound:,}" for bound, words in bounds if bound) or None


# ---------------------------------------------------------------------------------------------
# What it scores
# ---------------------------------------------------------------------------------------------


def _score(run: FinetuneRun, report: TrainingReport, answered: Sequence[Row]) -> Scored:
    curve = report.eval_score
    if not curve:
        return None
    sign = 1 if run.training.greater_is_better else -1
    is_best = run.config.load_best_model_at_end
    kept = max(curve[1:] or curve, key=lambda point: sign * point[1]) if is_best else curve[-1]
    scores = {row["sample_id"]: score for row in answered if (score := row["score"]) is not None}
    if kept != curve[-1] or not scores:
        return kept[1], None
    return kept[1], mean_interval([*scores.values()], _images_of(run, [*scores]))


def _images_of(run: FinetuneRun, names: Sequence[str]) -> list[bytes | str]:
    """Return what tells the images of evaluation samples apart."""
    evaluation = run.data.evaluation
    assert evaluation is not None
    indices = {sample_id(evaluation.split, index): index for sample in evaluation.turns for index in sample}
    keys = image_keys(evaluation.source, evaluation.spec, [indices[name] for name in names])
    return [key or name for key, name in zip(keys, names, strict=True)]


def _score_facts(report: TrainingReport, score: Scored, kind: str) -> Facts:
    losses = {
        f"{name}, first and last": f"{curve[0][1]:.4g}, {curve[-1][1]:.4g}"
        for name, curve in (("training loss", report.train_loss), ("evaluation loss", report.eval_loss))
        if curve
    }
    if score is None:
        return losses
    value, interval = score
    first = report.eval_score[0]
    details = interval and (
        f" (95 % interval {format_percent(interval.low)} to {format_percent(interval.high)}; "
        f"{interval.num_samples:,} samples, {interval.num_images:,} images)"
    )
    return {
        f"{report.metric} before training": format_percent(first[1]) if first[0] == 0 else None,
        f"{report.metric} after it": f"{format_percent(value)}{details or ''}",
        **losses,
        "of the merged model": "the checks below compare its answers with those of base and adapter"
        if kind == MERGED else None,
    }  # fmt: skip
