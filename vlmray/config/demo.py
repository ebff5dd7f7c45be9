"""Options of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlmray.config.common import Options, check_at_least
from vlmray.config.marks import option


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Options):
    """Teach the built-in model a family of questions that it does not know, and compare before and after."""

    family: str = option("naming", affects="result")
    """Family of chart questions to teach; the table in vlmray/builtin/charts.py has all of them."""

    # With 100 charts the interval of a large gain is about 5 points either side.
    num_charts: int = option(100, affects="result")
    """Held-out charts that are asked about before and after, with one question of every family each."""

    # Half more than it took until nothing was left to learn.
    max_steps: int = option(60, affects="result")
    """Optimizer steps of the training."""

    output_dir: str = option("outputs/demo", affects="run")
    """Where results and report go: a local folder. The same command with the same folder goes on."""

    overwrite: bool = option(False, affects="run")
    """Delete what an earlier run left in --output_dir instead of going on with it."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = option("INFO", affects="run")
    """Verbosity of the log."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "num_charts", "max_steps")
