"""What the steps of the GPU check work on: models, rows and sizes, at full scale and as a toy for CPUs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.models import build_random_model
from benchmarks.common.requests import read_requests
from vlmray.config import InferConfig
from vlmray.models.processors import load_processor
from vlmray.schema import GenerationRequest
from vlmray.storage.cache import make_once

Figures = Iterator[tuple[str, Any]]
"""What a step found, each as soon as it is known: a name with its unit, and a plain value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Sizes of the steps."""

    small: str
    """Name of a random model; `large` too."""

    large: str
    num_rows: int
    """Asked of the engine; `num_padded` of `generate` in batches of 8, `num_alone` of `generate` alone."""

    num_padded: int
    num_alone: int
    num_exact: int
    """Asked in lower precisions."""

    contract: str
    """Which contract tests: an expression for pytest's -k."""

    budget_factors: tuple[float, ...]
    """Batches to try, in units of the automatic budget."""

    num_samples: int
    """To train on, in batches of `batch_size`, twice."""

    batch_size: int
    num_piped: int
    """Rows for each run of the pipeline."""

    num_requests: int
    """For the most clients of the server."""

    max_pixels: int | None = None
    """Of an image; None: the processor's own limit."""

    patience: float = 1.0
    """Factor of the steps' time limits."""


SCALES = {
    "full": Scale(
        small="random-3b", large="random-7b", num_rows=300, num_padded=64, num_alone=16, num_exact=64,
        contract="", budget_factors=(1.0, 1.5, 2.0), num_samples=64, batch_size=8, num_piped=256,
        num_requests=96,
    ),
    "toy": Scale(
        small="random-toy", large="random-toy", num_rows=12, num_padded=8, num_alone=4, num_exact=16,
        contract="one_to_one or transformers_alone", budget_factors=(1.0,), num_samples=8, batch_size=2,
        num_piped=16, num_requests=16, max_pixels=64 * 28 * 28, patience=3.0,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a run of the check has to work with."""

    scale_name: str
    processor: str
    """Folder of a tokenizer, image processor and config."""

    dataset_name: str
    """Rows in the columns of a dataset that vlmray knows; local Parquet needs no `datasets`."""

    scratch: str
    """Folder for models and outputs, in memory where there is enough."""

    @property
    def scale(self) -> Scale:
        return SCALES[self.scale_name]

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.device == "cuda" else "float32"

    def load_processor(self) -> Any:
        """Load the processor, as the engine has it."""
        return load_processor(self.processor, max_pixels=self.scale.max_pixels)

    def read_requests(self, num_rows: int, *, forced: bool = True) -> list[GenerationRequest]:
        """Read the first rows as requests; forced ones end after as many tokens as their answer has."""
        config = InferConfig(
            model_id="builtin", dataset_name=self.dataset_name, dataset_split="test",
            sample_slices=f"[:{num_rows}]", max_new_tokens=16,
        )  # fmt: skip
        return read_requests(config, self.load_processor().tokenizer if forced else None)

    def model_folder(self, name: str) -> str:
        """Return the folder of a random model in the device's precision, written by whoever asks first."""
        folder = Path(self.scratch) / f"{name}-{self.dtype}"
        write = functools.partial(_write_model, name, self)
        make_once(folder, write)
        return str(folder)


def _write_model(name: str, setting: Setting, folder: Path) -> None:
    build_random_model(name, setting.processor, folder, dtype=setting.dtype, device=setting.device)
