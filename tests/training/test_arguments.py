"""The options as TRL takes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.finetuning import open_data
from vlmray.config import FinetuneConfig
from vlmray.errors import OptionError
from vlmray.training.arguments import _translate, parse_sft_config
from vlmray.training.run import TrainingRun

CHANGEABLE = {"gradient_checkpointing_kwargs", "logging_nan_inf_filter", "ddp_find_unused_parameters"}
"""What is set in another way than TRL does, and may be set again by `--sft_config`."""


def test_what_is_decided_here_cannot_be_changed_by_sft_config(tmp_path: Path) -> None:
    config = FinetuneConfig(
        dataset_name="charts?num_rows=4", optim="adamw_torch", fsdp=True, eval_split="test"
    )
    decided = _translate(TrainingRun.of(config, open_data(config)), tmp_path).keys() - CHANGEABLE
    assert len(decided) > 20
    for name in sorted(decided):
        with pytest.raises(OptionError, match=f"^--sft_config: {name} (has an option of its own|is set by)"):
            parse_sft_config({name: "1"})
