"""Histories of trainings, what interrupts them and what spoils their samples."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.finetuning import (
    curve,
    open_data,
)
from vlmray.training.worker import LocalWorker, Outcome

PIXELS = 4 * 28 * 28


def differ(found: list[float], expected: list[float]) -> float:
    """The largest difference of two curves."""
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


class Interruption(RuntimeError):
    """Stands for a worker that dies."""


def interrupted_at(step: int) -> type[LocalWorker]:
    class Worker(LocalWorker):
        def tell(self, **progress: Any) -> None:
            if progress.get("step") == step:
                raise Interruption

    return Worker


TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
TIMES += ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
TIMES += ("num_tokens", "eval_num_tokens")  # since the process started


def logged(outcome: Outcome) -> list[dict[str, Any]]:
    """The history without the summary at the end and without times."""
    entries = [entry for entry in outcome.history if "train_runtime" not in entry]
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in entries]


def assert_same_history(found: Outcome, expected: Outcome) -> None:
    pairs = list(zip(logged(found), logged(expected), strict=True))
    for one, other in pairs:
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], abs=1e-5), (name, one["step"])
    print(f"largest difference after a resume: {differ(curve(found), curve(expected)):.2g}")


BAD = {
    "empty answer": {"answers": [""]},
    "broken image": {"image": b"no picture"},
    "too long": {"question": "How many bars are there? " * 40},
    "special token": {"answers": ["<|image_pad|>"]},
}


def spoil(config: Any, bad: dict[int, str]) -> Any:
    return open_data(config, {index: BAD[reason] for index, reason in bad.items()})
