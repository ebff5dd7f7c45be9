"""Options: one frozen dataclass per job; the text under a field is its `--help`.

Standard library only. The dataclasses are what the library's functions take; `vlmray.config.parsing` builds
one from a command line and a YAML file. What jobs have in common is mixed in from here; `--help` shows the
options of the last base first.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vlmray.config.marks import mark, narrow_engines, option, refuse_foreign_options
from vlmray.errors import OptionError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
"""What a model or adapter may be called: it becomes a folder and a part of URLs."""


API_KEY = "VLMRAY_API_KEY"
"""Environment variable of the key that servers want of their clients, ours and others."""

_TRANSFORMERS = ("transformers", "fake")
_LOADING = ("transformers", "vllm", "fake")
"""Engines that load a model; the stand-in takes what any of them does."""
_VLLM = ("vllm",)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all options have in common: an empty one is a shell variable that was not set."""

    may_be_empty: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) == "" and field.name not in self.may_be_empty:
                raise OptionError(field.name, "is empty")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Options):
    """Which model."""

    model_id: str = option("Qwen/Qwen2.5-VL-7B-Instruct", affects="result")
    """Model on the hub, a local folder, or one that needs no network: builtin reads the built-in charts,
    tiny-random has random weights. It has to be a decoder-only image-text-to-text model."""


@dataclass(frozen=True, kw_only=True)
class LoadingConfig(Options):
    """How a model and its processor are loaded."""

    quantization: Literal["none", "8bit", "4bit"] = option("none", affects="result", engines=_TRANSFORMERS)
    """Load the weights quantized by bitsandbytes."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", affects="result", engines=_LOADING
    )
    """Precision; auto: the checkpoint's on a GPU, float32 without one."""

    attn_implementation: str | None = option(None, affects="speed", engines=_TRANSFORMERS)
    """Attention kernel: sdpa, flash_attention_2, eager, ...; default: transformers chooses."""

    min_pixels: int | None = option(None, affects="result")
    """Scale smaller images up to this many pixels; default: the model's processor."""

    max_pixels: int | None = option(None, affects="result")
    """Scale larger images down to this many pixels; default: the model's processor."""

    chat_template: str | None = option(None, affects="result", engines=_LOADING)
    """File of a Jinja chat template to use in the place of the model's own."""

    chat_template_kwargs: dict[str, Any] | None = dataclasses.field(
        default=None, metadata=mark("result", holds_json=True)
    )
    """Variables of the chat template, as a JSON object or a mapping in the YAML file:
    '{"enable_thinking": false}'."""

    trust_remote_code: bool = option(False, affects="run", engines=_LOADING)
    """Run Python code that the model's repository brings. Only for repositories you trust."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "min_pixels", "max_pixels")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise OptionError("min_pixels", f"{self.min_pixels} is above --max_pixels {self.max_pixels}")


@dataclass(frozen=True, kw_only=True)
class EngineConfig(LoadingConfig):
    """What generates, beside the model."""

    engine: Literal["auto", "transformers", "vllm", "openai", "fake"] = option("auto", affects="result")
    """What generates: transformers; vllm; openai, a server that is asked; fake, a stand-in for tests; auto:
    openai with --endpoint, vllm where it is installed and GPUs, model, adapters and options allow it,
    otherwise transformers."""

    verify_adapter: bool = option(False, affects="run", engines=("transformers", "vllm"))
    """Before an adapter answers, compare the scores of two fixed questions with those of a plain pass of
    PEFT, and refuse one that is answered otherwise. With vLLM each replica loads the model twice for it."""

    max_batch_tokens: int | None = option(None, affects="speed", engines=_TRANSFORMERS)
    """Prompt tokens per forward pass, at most, padding included; default: what the memory of a GPU holds,
    16384 on a CPU. Halved and remembered when memory runs out."""

    tensor_parallel_size: int = option(1, affects="speed", engines=_VLLM)
    """GPUs of one node that share the layers of a replica."""

    pipeline_parallel_size: int = option(1, affects="speed", engines=_VLLM)
    """GPUs of one node that have a part of the layers each."""

    max_model_len: int | None = option(None, affects="result", engines=_VLLM)
    """Tokens of a prompt and its answer, at most; default: what the model can and the memory holds."""

    gpu_memory_utilization: float | None = option(None, affects="speed", engines=_VLLM)
    """Share of a GPU's memory for weights, keys and values; default: 0.9."""

    engine_options: dict[str, Any] | None = dataclasses.field(default=None, metadata=mark("result", _VLLM))
    """All other options of the engine, under its own names, as a JSON object or a mapping in the YAML file:
    '{"max_num_seqs": 128}'."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(
            self, 1, "max_batch_tokens", "tensor_parallel_size", "pipeline_parallel_size", "max_model_len"
        )
        memory = self.gpu_memory_utilization
        if memory is not None and not 0 < memory <= 1:
            raise OptionError("gpu_memory_utilization", f"must be above 0 and at most 1, got {memory}")
        if self.engine == "auto":
            self.possible_engines()
        else:
            refuse_foreign_options(self, self.answering_engine)

    @property
    def answering_engine(self) -> str:
        """The engine that answers; an option that it does not know is refused."""
        return self.engine

    def possible_engines(self) -> tuple[tuple[str, ...], str | None]:
        """Return what `auto` has to choose from by the options given, and the one of them that decided.

        Raises:
            OptionError: Two options leave nothing.
        """
        return narrow_engines(self, ("transformers", "vllm"))


@dataclass(frozen=True, kw_only=True)
class ReplicaConfig(EngineConfig):
    """How many engines there are, and what each of them has."""

    least_replicas: ClassVar[int] = 1

    num_replicas: str | None = option(None, affects="speed")
    """Model replicas: N, or MIN,MAX to scale with the load (MIN of a server may be 0); default: one per GPU,
    or one without GPUs."""

    gpus_per_replica: float | None = option(None, affects="speed", engines=_LOADING)
    """GPUs of each replica (0.5: half of one, memory too); default: 1 where the cluster has GPUs, else 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "gpus_per_replica")
        if self.gpus_per_replica and self.cards > 1 and self.gpus_per_replica != self.cards:
            raise OptionError(
                "gpus_per_replica",
                f"{self.gpus_per_replica:g} is not what {self.cards} parts of the model need",
                "leave it out",
            )
        self.replica_range()

    @property
    def cards(self) -> int:
        """GPUs that share the model of a replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def replica_range(self) -> tuple[int, int] | None:
        """Return the smallest and largest number of replicas, or None where the cluster decides."""
        return read_range("num_replicas", self.num_replicas, self.least_replicas)


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(Options):
    """Which questions are asked, and how they are worded."""

    may_be_empty = ("system_prompt",)

    dataset_name: str = option("HuggingFaceM4/ChartQA", affects="result")
    """Dataset on the hub, a local folder or file (Parquet, JSONL, ...), s3://, gs:// or hf:// Parquet, or
    the built-in charts, with parameters: 'charts?num_rows=200&seed=7&family=difference'."""

    dataset_config: str | None = option(None, affects="result")
    """Configuration (subset) of the dataset, where it has several."""

    system_prompt: str | None = option(None, affects="result")
    """System message, but for rows that bring one; without it the model's chat template decides."""

    prompt_template: str | None = option(None, affects="derived")
    """User message, with {question} and, for multiple choice, {choices}; default: the dataset's own."""

    image_column: str | None = option(None, affects="derived")
    """Column of the image, or of a list of them, or several columns: image_1,image_2; none: ask without."""

    question_column: str | None = option(None, affects="derived")
    """Column of the question, or of a conversation: turns of role and content, or of from and value."""

    answer_column: str | None = option(None, affects="derived")
    """Column of the accepted answers: a string, a number or a list of them."""

    choices_column: str | None = option(None, affects="derived")
    """Column of the choices of a multiple-choice question, or one for each: A,B,C,D."""

    system_column: str | None = option(None, affects="derived")
    """Column of the system prompt of a conversation; default: system, where there is one."""

    family_column: str | None = option(None, affects="derived")
    """Column to break the score down by."""


@dataclass(frozen=True, kw_only=True)
class QuestionsConfig(DatasetConfig, LoadingConfig, ModelConfig):
    """Which model is asked which questions, and how its answers are scored."""

    metric: str | None = option(None, affects="derived")
    """Metric of the score; default: the dataset's own."""


@dataclass(frozen=True, kw_only=True)
class WaitingConfig(Options):
    """How long a job waits for a cluster."""

    wait_for_resources_s: float = option(1800.0, affects="run")
    """Seconds to wait for GPUs or CPUs that the cluster neither has nor is known to start; what others hold
    is waited for as long as it takes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "wait_for_resources_s")


@dataclass(frozen=True, kw_only=True)
class DryRunConfig(Options):
    """Whether a job only plans."""

    dry_run: bool = option(False, affects="run")
    """Say what would be done, with which rows, on which nodes, and stop; nothing is written."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(WaitingConfig):
    """How a run over a dataset goes."""

    seed: int = option(0, affects="result")
    """Seed of everything random."""

    max_errors: int | None = option(None, affects="run")
    """Stop once more rows than this have failed; default: never stop for failed rows."""

    overwrite: bool = option(False, affects="run")
    """Delete what an earlier run left in --output_dir instead of resuming it."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = option("INFO", affects="run")
    """Verbosity of the log."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "seed", "max_errors")


def check_verifies(config: EngineConfig, *, has_adapters: bool, hint: str) -> None:
    """Refuse to verify adapters where there are none."""
    if config.verify_adapter and not has_adapters:
        raise OptionError("verify_adapter", "has no adapter to compare", hint)


def check_at_least(config: object, minimum: float, *names: str) -> None:
    """Refuse options below a minimum; those that are None are not given."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= minimum:  # so written, it refuses NaN too
            raise OptionError(name, f"must be at least {minimum}, got {value}")


def read_range(name: str, text: str | None, least: int) -> tuple[int, int] | None:
    """Read what an option gives as N or MIN,MAX; None where it is not given.

    Raises:
        OptionError: it is something else, or begins below the least number.
    """
    if text is None:
        return None
    try:
        bounds = [int(part) for part in str(text).split(",")]  # Python callers may give a number
    except ValueError:
        bounds = []
    if len(bounds) not in (1, 2) or not least <= bounds[0] <= bounds[-1] or not bounds[-1]:
        raise OptionError(name, f"must be N or MIN,MAX of at least {least or '0,1'}, got {text!r}")
    return bounds[0], bounds[-1]


def shared_options(config: Any, config_class: type) -> dict[str, Any]:
    """Return the options that another config has too."""
    theirs = {field.name for field in dataclasses.fields(config_class)}
    mine = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: value for name, value in mine.items() if name in theirs}
