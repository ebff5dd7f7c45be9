"""Predictions as a dataset on the hub: one Parquet file, and a card that says what they are of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlmray import __version__
from vlmray.config import InferConfig, sampling_of
from vlmray.dataset.rows import MOST_ROWS_GROUPED, image_keys
from vlmray.dataset.slices import mask_rows, row_indices
from vlmray.dataset.sources import display_name, hub_dataset
from vlmray.inference.plan import InferenceRun
from vlmray.inference.summary import Summary
from vlmray.metrics.significance import Interval, mean_interval
from vlmray.publishing.cards import Facts, command_of, write_card
from vlmray.publishing.hub import HubRepo, license_of
from vlmray.publishing.private import public_text, public_value
from vlmray.reports.text import format_percent, format_rate
from vlmray.storage.scratch import scratch_folder

FILE = "predictions.parquet"
CARD = "README.md"

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def push_predictions(run: InferenceRun, repo: HubRepo, summary: Summary) -> None:
    """Push the predictions of a run.

    Raises:
        PushError: The hub did not take them.
    """
    card = _write_card(run, summary)
    with scratch_folder() as scratch:
        _write_predictions(run, scratch / FILE)
        repo.push({FILE: scratch / FILE, CARD: card.encode()}, f"Predictions by vlmray {__version__}")


def score_interval(run: InferenceRun) -> Interval | None:
    """Return the mean score with its interval; None without scores, or with too many images to read."""
    indices: list[int] = []
    scores: list[float] = []
    for table in _selected(run, ["sample_id", "score"]):
        scored = table.filter(pc.is_valid(table["score"]))
        indices += row_indices(scored["sample_id"]).tolist()
        scores += scored["score"].to_pylist()
    if not 0 < len(scores) <= MOST_ROWS_GROUPED:
        return None
    keys = image_keys(run.source, run.spec, indices)
    return mean_interval(scores, [key or str(index) for key, index in zip(keys, indices, strict=True)])


def dataset_head(dataset_name: str, num_rows: int, files: Mapping[str, tuple[str, str]]) -> Any:
    """Return the head of a card of predictions.

    Args:
        dataset_name: What was asked about.
        num_rows: Rows of all files.
        files: Split and path of each, by the name of its configuration.
    """
    from huggingface_hub import DatasetCardData

    source = hub_dataset(dataset_name)
    return DatasetCardData(
        license=license_of(source, "dataset") if source else None,
        task_categories=["visual-question-answering"],
        size_categories=[next((name for most, name in _SIZES if num_rows < most), "n>1M")],
        source_datasets=[source] if source else None,
        tags=["vlmray", "predictions"],
        configs=[
            {"config_name": name, "data_files": [{"split": _split_name(split), "path": path}]}
            for name, (split, path) in files.items()
        ],
    )


def dataset_facts(run: InferenceRun, num_rows: int) -> Facts:
    """Say what was asked about."""
    config = run.config
    return {
        "dataset": display_name(str(public_value(config.dataset_name)), config.dataset_config),
        "split": config.dataset_split,
        "rows": f"{config.sample_slices} ({num_rows:,})",
    }


def prompt_facts(run: InferenceRun) -> Facts:
    """Say how it was asked."""
    task, config = run.task, run.config
    form = task.form
    sampling = {name: value for name, value in sampling_of(config).items() if value not in (None, 0, 1.0, "")}
    return {
        "system": task.system_prompt,
        "question": task.prompt_template,
        "form of the answers": form and (form.schema or form.regex or list(form.choices)),
        "answers": "sampled" if config.temperature else "greedy",
        "answers drawn to each row": config.num_samples if config.num_samples > 1 else None,
        **{name: value for name, value in sampling.items() if name in _SHOWN},
    }


_SHOWN = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


def versions(engine: str) -> Facts:
    """Return the versions of what answered."""
    names = ["ray", "torch", "transformers", "pyarrow"]
    if engine == "vllm":  # whose build for CPUs goes by another name
        names += metadata.packages_distributions().get("vllm", [])[:1]
    return {"vlmray": __version__, **{name: metadata.version(name) for name in names}}


def format_interval(interval: Interval) -> str:
    """Word a score and how far off it may be."""
    return (
        f"{format_percent(interval.mean)} (95 % interval {format_percent(interval.low)} to "
        f"{format_percent(interval.high)}; {interval.num_samples:,} samples, {interval.num_images:,} images)"
    )


def _split_name(split: str) -> str:
    """Return what the datasets library takes as the name of a split."""
    return "".join(char if char.isalnum() and char.isascii() else "_" for char in split) or "test"


def _selected(run: InferenceRun, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield the result rows of the selection, a part at a time."""
    wanted = mask_rows(run.selected, len(run.source))
    for table in run.folder.scan(columns):
        indices = row_indices(table["sample_id"])
        known = (indices >= 0) & (indices < len(wanted))
        yield table.filter(pa.array(known & wanted[np.where(known, indices, 0)]))


def _write_predictions(run: InferenceRun, path: Path) -> None:
    """Write the rows of the selection into one file."""
    writer = None
    for table in _selected(run):
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(without_paths(table))
    if writer is not None:
        writer.close()


def without_paths(table: pa.Table) -> pa.Table:
    """Take paths of this machine out of what rows say of their errors."""
    errors = [None if each is None else public_text(each) for each in table["error"].to_pylist()]
    return table.set_column(table.schema.names.index("error"), "error", pa.array(errors, pa.string()))


def _write_card(run: InferenceRun, summary: Summary) -> str:
    config, usage = run.config, summary.usage
    model, data = model_name(config), dataset_facts(run, summary.num_rows)
    return write_card(
        dataset_head(config.dataset_name, summary.num_rows, {"default": (config.dataset_split, FILE)}),
        f"Answers of {model} to {data['dataset']}",
        f"{summary.num_answered:,} answers and {summary.num_failed:,} rows that failed, one row each, by "
        f"vlmray {__version__}.",
        {
            "Scores": _score_facts(run, summary),
            "Data": data,
            "Model": {
                "model": model,
                "engine": run.choice.engine,
                "precision": config.dtype,
                "quantization": None if config.quantization == "none" else config.quantization,
            },
            "Prompt": prompt_facts(run),
            "Work": {
                "answers per second": format_rate(summary.samples_per_s) if summary.samples_per_s else None,
                "answers taken over": summary.num_identical + summary.num_from_cache or None,
                "prompt tokens": summary.num_prompt_tokens,
                "tokens written": summary.num_completion_tokens,
                **({f"{usage.unit}-seconds held": f"{usage.held_s:,.0f}"} if usage else {}),
                "kWh taken by the GPUs": f"{usage.energy_kwh:,.4g}" if usage and usage.energy_kwh else None,
            },
            "Versions": versions(run.choice.engine),
            "Command": command_of("infer", config),
        },
    )


def model_name(config: InferConfig) -> str:
    """Return what the model is called where others read it."""
    adapter = f" + {public_value(config.adapter)}" if config.adapter else ""
    return f"{public_value(config.model_id)}{adapter}"


def _score_facts(run: InferenceRun, summary: Summary) -> Facts:
    if summary.metric is None or summary.score is None:
        return {}
    interval = score_interval(run)
    families = {
        f"{summary.metric}, {family.name}": f"{format_percent(family.score)} of {family.num_scored:,}"
        for family in summary.families
        if family.score is not None
    }
    whole = (
        format_interval(interval)
        if interval
        else f"{format_percent(summary.score)} of {summary.num_scored:,}"
    )
    return {summary.metric: whole, **families}
