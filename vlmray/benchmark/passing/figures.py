"""Figures of a comparison for a tracker."""

from __future__ import annotations

import dataclasses
from typing import Any

from vlmray.benchmark.suite.verdict import SuiteResults
from vlmray.benchmark.verdicts import Results
from vlmray.config import BenchmarkConfig
from vlmray.publishing.trackers import Figures


def benchmark_figures(config: BenchmarkConfig, results: Results) -> Figures:
    """Return what a tracker is told of a comparison."""
    return _figures(config, results.title, _numbers(results), {"verdict": " ".join(results.verdicts)})


def suite_figures(config: BenchmarkConfig, results: SuiteResults) -> Figures:
    """Return what a tracker is told of comparisons on several datasets."""
    numbers = {
        f"{name}/{figure}": value
        for name, each in results.results.items()
        for figure, value in _numbers(each).items()
    }
    title = f"{', '.join(results.models)} on {len(results.results)} datasets"
    return _figures(config, title, numbers, {"verdict": " ".join(results.sentences)})


def _figures(
    config: BenchmarkConfig, title: str, numbers: dict[str, float | None], texts: dict[str, str]
) -> Figures:
    options: dict[str, Any] = dataclasses.asdict(config)
    said = {name: text for name, text in texts.items() if text}
    return Figures(job="benchmark", title=title, options=options, numbers=numbers, texts=said)


def _numbers(results: Results) -> dict[str, float | None]:
    """Return scores and differences over all samples, what failed, and speed by model and load."""
    numbers: dict[str, float | None] = {
        "num_samples": results.num_samples,
        "num_answered": results.num_answered,
        "elapsed_s": results.elapsed_s,
    }
    for name, errors in results.errors.items():
        numbers[f"{name}/num_failed"] = sum(group.num_rows for group in errors)
    board = results.board
    for score in board.scores if board else ():
        if score.kind == "all":
            place = f"{score.model}/{score.metric}"
            numbers |= {place: score.interval.mean, f"{place}_low": score.interval.low}
            numbers[f"{place}_high"] = score.interval.high
    for found in board.differences if board else ():
        if found.kind == "all":
            place = f"{found.model}/{found.metric}_difference"
            numbers |= {place: found.difference.mean, f"{place}_low": found.difference.low}
            numbers |= {f"{place}_high": found.difference.high, f"{place}_p": found.p_corrected}
    for drawn in results.drawn:
        numbers |= {f"{drawn.model}/{name}": value for name, value in drawn.figures().items()}
    for point in results.speed:
        numbers |= {f"{point.model}/{name}": value for name, value in _speed(point).items()}
    return numbers


def _speed(point: Any) -> dict[str, float | None]:
    load = f"load_{point.load:g}"
    return {f"{load}/{name}": value for name, value in dataclasses.asdict(point).items() if _is_number(value)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
