"""Figures of a finished run for trackers of experiments: Weights & Biases, MLflow."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmray.errors import OptionError, RunError, one_line
from vlmray.publishing.private import public_value

_PROJECT = "vlmray"
_LONGEST = 500
"""Characters of a value that every tracker takes."""


class TrackerError(RunError):
    """Figures that a tracker did not take; they are in the output folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """A finished run as trackers take it."""

    job: str
    title: str
    options: Mapping[str, Any]
    numbers: Mapping[str, float | None]
    """By name; None is left out."""

    texts: Mapping[str, str] = field(default_factory=dict)
    """What is said in words, such as verdicts."""


def check_tracker(name: str) -> None:
    """Refuse a tracker whose package is not there, before the run.

    Raises:
        OptionError: It is not.
    """
    if name != "none" and importlib.util.find_spec(name) is None:
        raise OptionError("report_to", f"{name} needs a package: pip install {name}")


def report_figures(name: str, figures: Figures) -> None:
    """Send the figures of a run to a tracker, as a run of its own.

    Raises:
        TrackerError: It did not take them.
    """
    if name == "none":
        return
    numbers = {_clean(key): float(value) for key, value in figures.numbers.items() if value is not None}
    try:
        {"wandb": _to_wandb, "mlflow": _to_mlflow}[name](figures, numbers)
    except Exception as error:  # trackers have many ways to fail, and none may cost the run
        raise TrackerError(
            f"{name} did not take the figures ({type(error).__name__}: {one_line(error, 200)})"
        ) from error


def _to_wandb(figures: Figures, numbers: Mapping[str, float]) -> None:
    import wandb

    with wandb.init(
        project=os.environ.get("WANDB_PROJECT", _PROJECT),
        job_type=figures.job,
        name=figures.title,
        config=public_value(dict(figures.options)),
    ) as run:
        run.summary.update({**numbers, **figures.texts})


def _to_mlflow(figures: Figures, numbers: Mapping[str, float]) -> None:
    import mlflow

    given = public_value({name: value for name, value in figures.options.items() if value is not None})
    with mlflow.start_run(run_name=figures.title):
        mlflow.log_params({name: _text(value) for name, value in given.items()})
        mlflow.log_metrics(dict(numbers))
        mlflow.set_tags(
            {"job": figures.job, **{_clean(name): _text(text) for name, text in figures.texts.items()}}
        )


def _text(value: Any) -> str:
    return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))[:_LONGEST]


def _clean(name: str) -> str:
    """Return a name of characters that MLflow takes."""
    return "".join(char if char.isalnum() or char in "_-. /" else "_" for char in name)
