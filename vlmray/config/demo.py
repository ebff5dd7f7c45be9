"""Options of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlmray.config.common import check_at_least, check_not_empty


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """Teach the built-in model a family of questions that it does not know, and compare before and after."""

    family: str = "naming"
    """Family of chart questions to teach; the table in vlmray/builtin/charts.py has all of them."""

    num_charts: int = 100  # the interval of a large gain is then about 5 points either side
    """Held-out charts that are asked about before and after, with one question of every family each."""

    max_steps: int = 60  # half more than it took until nothing was left to learn
    """Optimizer steps of the training."""

    output_dir: str = "outputs/demo"
    """Where results and report go: a local folder. The same command with the same folder goes on."""

    overwrite: bool = False
    """Delete what an earlier run left in --output_dir instead of going on with it."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Verbosity of the log."""

    def __post_init__(self) -> None:
        check_not_empty(self)
        check_at_least(self, 1, "num_charts", "max_steps")
