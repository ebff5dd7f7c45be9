"""Options of the job that answers a dataset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlmray.config.common import QuestionsConfig, check_at_least, parse_replica_range
from vlmray.errors import OptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class InferConfig(QuestionsConfig):
    """Answer a visual-question dataset with a vision-language model on Ray."""

    adapter: str | None = None
    """PEFT adapter folder to put on the model."""

    dataset_split: str = "test"
    """Split to answer."""

    sample_slices: str
    """Rows to answer, as Python slices: '[0:100]', '[:]', '[-5:]', '[::10]', '[7]', '[:10],[50:60]'."""

    output_dir: str = "outputs/vlm"
    """Where results go: a local folder of this machine, or a URI that every node can write. The same
    command with the same folder resumes."""

    output_format: Literal["files", "parquet", "both"] = "both"
    """files: three files per sample; parquet: the same rows as Parquet; or both."""

    max_new_tokens: int = 512
    """Tokens to generate per answer, at most."""

    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""

    top_p: float = 1.0
    """Nucleus sampling: the smallest set of tokens with this probability."""

    engine: Literal["transformers", "fake"] = "transformers"
    """What generates: transformers, or a scripted stand-in for tests of the pipeline."""

    batch_size: int = 64
    """Rows per forward pass, at most."""

    max_batch_tokens: int | None = None
    """Prompt tokens per forward pass, at most, padding included; default: what the memory of a GPU holds,
    16384 on a CPU. Halved and remembered when memory runs out."""

    num_replicas: str | None = None
    """Model replicas: N, or MIN,MAX to scale with the work; default: one per GPU, or one without GPUs."""

    gpus_per_replica: float | None = None
    """GPUs of each replica (0.5: half of one, memory too); default: 1 where the cluster has GPUs, else 0."""

    def __post_init__(self) -> None:
        QuestionsConfig.__post_init__(self)  # super() does not work in a dataclass with slots
        check_at_least(self, 1, "max_new_tokens", "batch_size", "max_batch_tokens")
        check_at_least(self, 0, "temperature", "gpus_per_replica")
        if not 0 < self.top_p <= 1:
            raise OptionError("top_p", f"must be above 0 and at most 1, got {self.top_p}")
        self.replica_range()

    def replica_range(self) -> tuple[int, int] | None:
        """Return the smallest and largest number of replicas, or None where the cluster decides."""
        return parse_replica_range(self.num_replicas, least=1)
