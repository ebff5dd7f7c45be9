"""Options of the job that answers a dataset."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vlmray.config.common import (
    DryRunConfig,
    QuestionsConfig,
    ReplicaConfig,
    RunConfig,
    check_at_least,
    check_verifies,
)
from vlmray.config.endpoint import EndpointConfig
from vlmray.config.marks import mark, option
from vlmray.config.passing import PushConfig, TrackingConfig
from vlmray.config.sampling import ConfidenceConfig, ReuseConfig


@dataclass(frozen=True, kw_only=True)
class InferConfig(
    DryRunConfig,
    TrackingConfig,
    PushConfig,
    RunConfig,
    ConfidenceConfig,
    ReuseConfig,
    EndpointConfig,
    ReplicaConfig,
    QuestionsConfig,
):
    """Answer a visual-question dataset with a vision-language model on Ray."""

    adapter: str | None = option(None, affects="result", engines=("transformers", "vllm", "fake"))
    """PEFT adapter folder to put on the model."""

    dataset_split: str = option("test", affects="result")
    """Split to answer."""

    sample_slices: str = field(metadata=mark("rows"))
    """Rows to answer, as Python slices: '[0:100]', '[:]', '[-5:]', '[::10]', '[7]', '[:10],[50:60]'."""

    output_dir: str = option("outputs/vlm", affects="run")
    """Where results go: a local folder of this machine, or a URI that every node can write. The same
    command with the same folder resumes."""

    output_format: Literal["auto", "files", "parquet", "both"] = option("auto", affects="result")
    """files: three files per sample; parquet: the same rows as Parquet; or both. auto: what --output_dir has
    already, else both up to 10,000 rows and parquet above."""

    max_new_tokens: int = option(512, affects="result")
    """Tokens to generate per answer, at most."""

    batch_size: int = option(64, affects="speed", engines=("transformers", "openai", "fake"))
    """Rows per forward pass, at most; that of vLLM is max_num_seqs of --engine_options."""

    price_per_hour: float | None = option(None, affects="run")
    """Price of a GPU for an hour, or of a replica without, in any currency, for what the run cost."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "max_new_tokens", "batch_size")
        check_at_least(self, 0, "price_per_hour")
        check_verifies(self, has_adapters=self.adapter is not None, hint="pass one as --adapter")
