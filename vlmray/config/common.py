"""Options: one frozen dataclass per job; the text under a field is its `--help`.

Standard library only. The dataclasses are what the library's functions take; `vlmray.config.parsing` builds
one from a command line and a YAML file.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
"""What a model or adapter may be called: it becomes a folder and a part of URLs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model, and how it is loaded."""

    model_id: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    """Model on the hub, a local folder, or one that needs no network: builtin reads the built-in charts,
    tiny-random has random weights. It has to be a decoder-only image-text-to-text model."""

    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Load the weights quantized by bitsandbytes."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision; auto: the checkpoint's on a GPU, float32 without one."""

    attn_implementation: str | None = None
    """Attention kernel: sdpa, flash_attention_2, eager, ...; default: transformers chooses."""

    min_pixels: int | None = None
    """Scale smaller images up to this many pixels; default: the model's processor."""

    max_pixels: int | None = None
    """Scale larger images down to this many pixels; default: the model's processor."""

    trust_remote_code: bool = False
    """Run Python code that the model's repository brings. Only for repositories you trust."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "min_pixels", "max_pixels")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"--min_pixels {self.min_pixels} is above --max_pixels {self.max_pixels}")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionsConfig(ModelConfig):
    """Which model is asked which questions, and how: what jobs over datasets have in common."""

    dataset_name: str = "HuggingFaceM4/ChartQA"
    """Dataset on the hub, a local folder or file (Parquet, JSONL, ...), s3://, gs:// or hf:// Parquet, or
    the built-in charts, with parameters: 'charts?num_rows=200&seed=7&family=difference'."""

    dataset_config: str | None = None
    """Configuration (subset) of the dataset, where it has several."""

    system_prompt: str | None = None
    """System message; without it the model's chat template decides."""

    prompt_template: str | None = None
    """User message, with {question} and, for multiple choice, {choices}; default: the dataset's own."""

    image_column: str | None = None
    """Column of the image, for a dataset that is not registered."""

    question_column: str | None = None
    """Column of the question."""

    answer_column: str | None = None
    """Column of the accepted answers: a string, a number or a list of them."""

    family_column: str | None = None
    """Column to break the score down by."""

    metric: str | None = None
    """Metric of the score; default: the dataset's own."""

    seed: int = 0
    """Seed of everything random."""

    max_errors: int | None = None
    """Stop once more rows than this have failed; default: never stop for failed rows."""

    overwrite: bool = False
    """Delete what an earlier run left in --output_dir instead of resuming it."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Verbosity of the log."""

    def __post_init__(self) -> None:
        # Only an empty system prompt means something; elsewhere it is a shell variable that was not set.
        check_not_empty(self, except_for="system_prompt")
        ModelConfig.__post_init__(self)
        check_at_least(self, 0, "seed", "max_errors")


def parse_replica_range(num_replicas: str | None, *, least: int) -> tuple[int, int] | None:
    """Read `--num_replicas`: one number, or the least and the most with a comma between them."""
    if num_replicas is None:
        return None
    try:
        bounds = [int(part) for part in num_replicas.split(",")]
    except ValueError:
        bounds = []
    if len(bounds) not in (1, 2) or not least <= bounds[0] <= bounds[-1] or not bounds[-1]:
        raise ValueError(
            f"--num_replicas must be N or MIN,MAX of at least {least or '0,1'}, got {num_replicas!r}"
        )
    return bounds[0], bounds[-1]


def check_not_empty(config: Any, *, except_for: str = "") -> None:
    """Refuse options that are an empty string."""
    for field in dataclasses.fields(config):
        if getattr(config, field.name) == "" and field.name != except_for:
            raise ValueError(f"--{field.name} is empty")


def check_at_least(config: object, minimum: float, *names: str) -> None:
    """Refuse options below a minimum; those that are None are not given."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= minimum:  # so written, it refuses NaN too
            raise ValueError(f"--{name} must be at least {minimum}, got {value}")
