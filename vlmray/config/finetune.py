"""Options of the job that fine-tunes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vlmray.config.common import DryRunConfig, QuestionsConfig, RunConfig, check_at_least, read_range
from vlmray.config.marks import mark, option
from vlmray.config.passing import PushConfig
from vlmray.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(DryRunConfig, PushConfig, RunConfig, QuestionsConfig):
    """Fine-tune a vision-language model on a visual-question dataset, with LoRA or in full, on Ray Train."""

    dataset_split: str = option("train", affects="result")
    """Split to train on."""

    sample_slices: str = option("[:]", affects="result")
    """Rows to train on, as Python slices: '[:1000]', '[:]', '[-500:]', '[::10]'."""

    max_turns: int = option(1, affects="result")
    """Ask up to this many consecutive rows about one image in one conversation, which encodes it once."""

    train_on: Literal["all", "last"] | None = option(None, affects="result")
    """Answers of a conversation that are trained on: all, or the last alone; default: all."""

    max_length: int | None = option(None, affects="result")
    """Longest sample in tokens, image included; longer ones are counted as failed, never cut."""

    eval_split: str | None = option(None, affects="run")
    """Split to evaluate on; default: no evaluation, or --dataset_split where --eval_slices is given."""

    eval_slices: str | None = option(None, affects="run")
    """Rows to evaluate on, as Python slices; default: all of --eval_split."""

    eval_steps: int = option(100, affects="run")
    """Evaluate every this many optimizer steps, and before the first and after the last."""

    eval_samples: int = option(100, affects="run")
    """Evaluation rows that the model also answers, for the metric; the first ones; 0: the loss alone."""

    max_new_tokens: int = option(64, affects="run")
    """Tokens to generate per answer of an evaluation, at most."""

    output_dir: str = option("outputs/finetune", affects="run")
    """Where adapter, checkpoints and report go: a local folder, or a URI that every node can write."""

    resume: bool = option(False, affects="run")
    """Go on from the last checkpoint in --output_dir."""

    use_peft: bool = option(True, affects="result")
    """Train a LoRA adapter; false trains all parameters."""

    lora_r: int = option(16, affects="result")
    """Rank of the adapter."""

    lora_alpha: int = option(32, affects="result")
    """Scale of the adapter: it is multiplied by lora_alpha / lora_r."""

    lora_dropout: float = option(0.05, affects="result")
    """Dropout on the adapter's input."""

    lora_target_modules: str | None = option(None, affects="result")
    """Modules to adapt: names ('q_proj,v_proj') or a regular expression over full module names; default:
    attention and MLP projections of the language model."""

    lora_vision: bool = option(False, affects="result")
    """Adapt the vision tower too."""

    lora_merger: bool = option(False, affects="result")
    """Adapt the merger between vision tower and language model too."""

    vision_cache_gib: float = option(32.0, affects="speed")
    """Disk space of each worker, in TMPDIR, for what the vision tower makes of images that come again, where
    nothing in it is trained; 0: compute it every time."""

    freeze_vision: bool = option(False, affects="result")
    """Without LoRA: keep the vision tower as it is."""

    learning_rate: float = option(1e-4, affects="result")
    """Peak learning rate."""

    num_train_epochs: float = option(1.0, affects="result")
    """Passes over the data."""

    max_steps: int = option(-1, affects="result")
    """Optimizer steps; above 0 it overrides --num_train_epochs."""

    per_device_train_batch_size: int = option(4, affects="derived")
    """Samples per worker and forward pass."""

    per_device_eval_batch_size: int = option(8, affects="speed")
    """Samples per worker and forward pass of an evaluation."""

    gradient_accumulation_steps: int = option(1, affects="derived")
    """Forward passes per optimizer step."""

    train_sampling_strategy: Literal["random", "group_by_length"] = option("random", affects="result")
    """Which samples share a step: any, or those of like length, which spares padding; for that all samples
    are read once before training. Images given by URL count as equally large."""

    warmup_ratio: float = option(0.03, affects="result")
    """Share of the steps over which the learning rate rises."""

    lr_scheduler_type: str = option("cosine", affects="result")
    """Learning rate schedule: cosine, linear, constant_with_warmup, ..."""

    weight_decay: float = option(0.0, affects="result")
    """Decoupled weight decay of AdamW."""

    optim: str | None = option(None, affects="result")
    """Optimizer: a name that transformers knows, or muon for Muon on the matrices of hidden layers and AdamW
    on the rest; default: AdamW."""

    gradient_checkpointing: bool | None = option(None, affects="speed")
    """Compute activations again in the backward pass to save memory; default: on a GPU."""

    bf16: bool | None = option(None, affects="result")
    """Mixed precision in bfloat16; default: on a GPU that has it. On a CPU with AMX it is faster too."""

    logging_steps: int = option(5, affects="run")
    """Log the loss every this many optimizer steps."""

    save_steps: int = option(100, affects="run")
    """Write a checkpoint every this many optimizer steps, and after the last."""

    save_total_limit: int | None = option(2, affects="run")
    """Checkpoints to keep."""

    early_stopping_patience: int | None = option(None, affects="run")
    """Stop after this many evaluations without a better score (or loss, where there is no score)."""

    load_best_model_at_end: bool = option(False, affects="run")
    """Keep the best evaluated checkpoint instead of the last; needs --save_steps equal to --eval_steps."""

    report_to: Literal["none", "tensorboard", "wandb", "mlflow"] = option("none", affects="run")
    """Where to send the curves, beside the report."""

    fsdp: bool = option(False, affects="speed")
    """Shard weights, gradients and optimizer over the workers, for a model that does not fit on one GPU."""

    sft_config: dict[str, Any] | None = field(default=None, metadata=mark("result"))
    """Any other field of TRL's SFTConfig: a mapping in the YAML file, or JSON: '{"max_grad_norm": 0.5}'."""

    num_workers: str | None = option(None, affects="derived")
    """Training workers: N, or MIN,MAX to go on with fewer where machines leave, each step with the samples of
    MAX workers; default: one per GPU, or two on CPUs."""

    max_failures: int = option(3, affects="run")
    """Times to start again from the same checkpoint after a worker died; machines that leave do not count."""

    merge_adapter: bool = option(False, affects="run")
    """Also write the model with the adapter merged into the unquantized base."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(
            self, 1, "max_turns", "max_length", "eval_steps", "max_new_tokens", "lora_r", "lora_alpha",
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "logging_steps", "save_steps", "save_total_limit", "early_stopping_patience",
        )  # fmt: skip
        check_at_least(
            self, 0, "vision_cache_gib", "eval_samples", "learning_rate", "weight_decay", "max_failures"
        )
        for name in ("lora_dropout", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise OptionError(name, f"must be at least 0 and below 1, got {getattr(self, name)}")
        if self.max_steps == 0 or self.max_steps < -1:
            raise OptionError("max_steps", f"must be -1 (not set) or at least 1, got {self.max_steps}")
        if not self.num_train_epochs > 0:
            raise OptionError("num_train_epochs", f"must be above 0, got {self.num_train_epochs}")
        if self.resume and self.overwrite:
            raise OptionError("resume", "keeps what --overwrite deletes", "pass one of them")
        self._check_combinations()
        self._check_sharding()

    def worker_range(self) -> tuple[int, int] | None:
        """Return the smallest and largest number of workers, or None where the cluster decides."""
        return read_range("num_workers", self.num_workers, 1)

    def _check_combinations(self) -> None:
        """Refuse options that contradict each other or would be ignored."""
        if not self.use_peft:
            for name in ("lora_target_modules", "lora_vision", "lora_merger", "merge_adapter"):
                if getattr(self, name):
                    raise OptionError(name, "is about LoRA and --use_peft false trains without it")
            if self.quantization != "none":
                raise OptionError(
                    "quantization",
                    f"{self.quantization} needs LoRA: quantized weights cannot be trained",
                    "leave out --use_peft false or --quantization",
                )
        elif self.freeze_vision:
            raise OptionError(
                "freeze_vision", "is for --use_peft false", "LoRA leaves all base weights frozen"
            )
        if not self.evaluates:
            for name in ("early_stopping_patience", "load_best_model_at_end"):
                if getattr(self, name):
                    raise OptionError(name, "needs an evaluation", "pass --eval_split or --eval_slices")
        if self.load_best_model_at_end and self.save_steps != self.eval_steps:
            raise OptionError(
                "load_best_model_at_end",
                f"needs --save_steps {self.save_steps} equal to --eval_steps {self.eval_steps}, so that what "
                "was evaluated was kept",
            )

    def _check_sharding(self) -> None:
        low, high = self.worker_range() or (1, 1)
        if self.fsdp and low != high:
            raise OptionError(
                "num_workers",
                f"{self.num_workers} lets workers come and go, which the shards of --fsdp do not",
                "pass one number",
            )
        if self.fsdp and self.optim == "muon":
            raise OptionError("optim", "muon needs whole matrices and --fsdp shards them", "pass one of them")

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate on."""
        return self.eval_split is not None or self.eval_slices is not None
