"""Figures of a run for a tracker."""

from __future__ import annotations

import dataclasses

from vlmray.inference.passing.predictions import model_name, score_interval
from vlmray.inference.plan import InferenceRun
from vlmray.inference.summary import Summary
from vlmray.publishing.trackers import Figures

_COUNTS = (
    "num_rows", "num_answered", "num_failed", "num_resumed", "num_identical", "num_from_cache",
    "num_scored", "score_with_failures",
    "num_prompt_tokens", "num_completion_tokens", "samples_per_s", "tokens_per_s", "elapsed_s",
)  # fmt: skip


def run_figures(run: InferenceRun, summary: Summary) -> Figures:
    """Return what a tracker is told of a run: score with its interval, families, counts, rates, usage."""
    numbers = {name: getattr(summary, name) for name in _COUNTS}
    if summary.metric is not None:
        numbers[summary.metric] = summary.score
        # MLflow's files: what lies below a name cannot be named so itself
        numbers |= {f"{family.name}/{summary.metric}": family.score for family in summary.families}
        if interval := score_interval(run):
            numbers |= {f"{summary.metric}_low": interval.low, f"{summary.metric}_high": interval.high}
    if summary.drawn:
        numbers |= summary.drawn.figures()
    if summary.usage:
        usage = dataclasses.asdict(summary.usage)
        numbers |= {name: value for name, value in usage.items() if name != "unit"}
    return Figures(
        job="infer",
        title=f"{model_name(run.config)} on {run.config.dataset_name}",
        options=dataclasses.asdict(run.config),
        numbers=numbers,
    )
