"""Options: one frozen dataclass per job; the text under a field is its `--help`.

Standard library only. The dataclasses are what the library's functions take; `vlmray.config.parsing` builds
one from a command line and a YAML file.
"""

from __future__ import annotations

import dataclasses
import math
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
        _at_least(self, 1, "min_pixels", "max_pixels")
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
        _not_empty(self, except_for="system_prompt")
        ModelConfig.__post_init__(self)
        _at_least(self, 0, "seed", "max_errors")


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
        _at_least(self, 1, "max_new_tokens", "batch_size", "max_batch_tokens")
        _at_least(self, 0, "temperature", "gpus_per_replica")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p must be above 0 and at most 1, got {self.top_p}")
        self.replica_range()

    def replica_range(self) -> tuple[int, int] | None:
        """Return the smallest and largest number of replicas, or None where the cluster decides."""
        return _replica_range(self.num_replicas, least=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig(QuestionsConfig):
    """Fine-tune a vision-language model on a visual-question dataset, with LoRA or in full, on Ray Train."""

    dataset_split: str = "train"
    """Split to train on."""

    sample_slices: str = "[:]"
    """Rows to train on, as Python slices: '[:1000]', '[:]', '[-500:]', '[::10]'."""

    max_turns: int = 1
    """Ask up to this many consecutive rows about one image in one conversation, which encodes it once."""

    max_length: int | None = None
    """Longest sample in tokens, image included; longer ones are counted as failed, never cut."""

    eval_split: str | None = None
    """Split to evaluate on; default: no evaluation, or --dataset_split where --eval_slices is given."""

    eval_slices: str | None = None
    """Rows to evaluate on, as Python slices; default: all of --eval_split."""

    eval_steps: int = 100
    """Evaluate every this many optimizer steps, and before the first and after the last."""

    eval_samples: int = 100
    """Evaluation rows that the model also answers, for the metric; the first ones; 0: the loss alone."""

    max_new_tokens: int = 64
    """Tokens to generate per answer of an evaluation, at most."""

    output_dir: str = "outputs/finetune"
    """Where adapter, checkpoints and report go: a local folder, or a URI that every node can write."""

    resume: bool = False
    """Go on from the last checkpoint in --output_dir."""

    use_peft: bool = True
    """Train a LoRA adapter; false trains all parameters."""

    lora_r: int = 16
    """Rank of the adapter."""

    lora_alpha: int = 32
    """Scale of the adapter: it is multiplied by lora_alpha / lora_r."""

    lora_dropout: float = 0.05
    """Dropout on the adapter's input."""

    lora_target_modules: str | None = None
    """Modules to adapt: names ('q_proj,v_proj') or a regular expression over full module names; default:
    attention and MLP projections of the language model."""

    lora_vision: bool = False
    """Adapt the vision tower too."""

    lora_merger: bool = False
    """Adapt the merger between vision tower and language model too."""

    vision_cache_gib: float = 32.0
    """Disk space of each worker, in TMPDIR, for what the vision tower makes of images that come again, where
    nothing in it is trained; 0: compute it every time."""

    freeze_vision: bool = False
    """Without LoRA: keep the vision tower as it is."""

    learning_rate: float = 1e-4
    """Peak learning rate."""

    num_train_epochs: float = 1.0
    """Passes over the data."""

    max_steps: int = -1
    """Optimizer steps; above 0 it overrides --num_train_epochs."""

    per_device_train_batch_size: int = 4
    """Samples per worker and forward pass."""

    per_device_eval_batch_size: int = 8
    """Samples per worker and forward pass of an evaluation."""

    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""

    train_sampling_strategy: Literal["random", "group_by_length"] = "random"
    """Which samples share a step: any, or those of like length, which spares padding; for that all samples
    are read once before training. Images given by URL count as equally large."""

    warmup_ratio: float = 0.03
    """Share of the steps over which the learning rate rises."""

    lr_scheduler_type: str = "cosine"
    """Learning rate schedule: cosine, linear, constant_with_warmup, ..."""

    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""

    optim: str | None = None
    """Optimizer: a name that transformers knows, or muon for Muon on the matrices of hidden layers and AdamW
    on the rest; default: AdamW."""

    gradient_checkpointing: bool | None = None
    """Compute activations again in the backward pass to save memory; default: on a GPU."""

    bf16: bool | None = None
    """Mixed precision in bfloat16; default: on a GPU that has it. On a CPU with AMX it is faster too."""

    logging_steps: int = 5
    """Log the loss every this many optimizer steps."""

    save_steps: int = 100
    """Write a checkpoint every this many optimizer steps, and after the last."""

    save_total_limit: int | None = 2
    """Checkpoints to keep."""

    early_stopping_patience: int | None = None
    """Stop after this many evaluations without a better score (or loss, where there is no score)."""

    load_best_model_at_end: bool = False
    """Keep the best evaluated checkpoint instead of the last; needs --save_steps equal to --eval_steps."""

    report_to: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    """Where to send the curves, beside the report."""

    fsdp: bool = False
    """Shard weights, gradients and optimizer over the workers, for a model that does not fit on one GPU."""

    sft_config: dict[str, Any] | None = None
    """Any other field of TRL's SFTConfig: a mapping in the YAML file, or JSON: '{"max_grad_norm": 0.5}'."""

    num_workers: int | None = None
    """Training workers; default: one per GPU, or two on CPUs."""

    max_failures: int = 3
    """Times to start again from the last checkpoint when a worker or node dies."""

    merge_adapter: bool = False
    """Also write the model with the adapter merged into the unquantized base."""

    def __post_init__(self) -> None:
        QuestionsConfig.__post_init__(self)
        _at_least(
            self, 1, "max_turns", "max_length", "eval_steps", "max_new_tokens", "lora_r", "lora_alpha",
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "logging_steps", "save_steps", "save_total_limit", "early_stopping_patience", "num_workers",
        )  # fmt: skip
        _at_least(
            self, 0, "vision_cache_gib", "eval_samples", "learning_rate", "weight_decay", "max_failures"
        )
        for name in ("lora_dropout", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"--max_steps must be -1 (not set) or at least 1, got {self.max_steps}")
        if not self.num_train_epochs > 0:
            raise ValueError(f"--num_train_epochs must be above 0, got {self.num_train_epochs}")
        if self.resume and self.overwrite:
            raise ValueError("--resume keeps what --overwrite deletes; pass one of them")
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Refuse options that contradict each other or would be ignored."""
        if not self.use_peft:
            for name in ("lora_target_modules", "lora_vision", "lora_merger", "merge_adapter"):
                if getattr(self, name):
                    raise ValueError(f"--{name} is about LoRA and --use_peft false trains without it")
            if self.quantization != "none":
                raise ValueError(
                    f"--quantization {self.quantization} needs LoRA: quantized weights cannot be trained; "
                    "leave out --use_peft false or --quantization"
                )
        elif self.freeze_vision:
            raise ValueError("--freeze_vision is for --use_peft false; LoRA leaves all base weights frozen")
        if self.fsdp and self.optim == "muon":
            raise ValueError("--optim muon needs whole matrices and --fsdp shards them; pass one of them")
        if not self.evaluates:
            for name in ("early_stopping_patience", "load_best_model_at_end"):
                if getattr(self, name):
                    raise ValueError(f"--{name} needs an evaluation; pass --eval_split or --eval_slices")
        if self.load_best_model_at_end and self.save_steps != self.eval_steps:
            raise ValueError(
                f"--load_best_model_at_end needs --save_steps {self.save_steps} equal to --eval_steps "
                f"{self.eval_steps}, so that what was evaluated was kept"
            )

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate on."""
        return self.eval_split is not None or self.eval_slices is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig(ModelConfig):
    """Serve a vision-language model and adapters behind an OpenAI-compatible endpoint on Ray Serve."""

    served_model_name: str | None = None
    """Name that clients ask the base model by; default: --model_id."""

    adapters: str | None = None
    """Adapters beside the base: 'name=folder,other=s3://bucket/folder'. Clients ask one by its name."""

    adapter_dir: str | None = None
    """Folder or URI whose subfolders are adapters too, each loaded when it is first asked."""

    max_adapters: int = 8
    """Adapters that a replica holds at a time; those not asked for longest make room."""

    engine: Literal["transformers", "fake"] = "transformers"
    """What generates: transformers, or a scripted stand-in for tests."""

    host: str = "127.0.0.1"
    """Address to listen on. Others than loopback need an API key, in the environment variable
    VLMRAY_API_KEY."""

    port: int = 8000
    """Port to listen on."""

    num_replicas: str | None = None
    """Model replicas: N, or MIN,MAX to scale with the load, MIN from 0; default: one per GPU, or one without
    GPUs."""

    gpus_per_replica: float | None = None
    """GPUs of each replica (0.5: half of one, memory too); default: 1 where the cluster has GPUs, else 0."""

    target_ongoing_requests: int | None = None
    """Requests per replica at which more replicas are started; default: --max_batch_size."""

    upscale_delay_s: float = 10.0
    """Start replicas once the load has called for them this long."""

    downscale_delay_s: float = 300.0
    """Stop replicas once the load has not needed them this long."""

    max_batch_size: int = 16
    """Requests that share a forward pass, at most."""

    max_batch_tokens: int | None = None
    """Prompt tokens per forward pass, at most, padding included; default: what the memory of a GPU holds,
    16384 on a CPU. Halved and remembered when memory runs out."""

    batch_wait_timeout_s: float = 0.01
    """Wait this long for more requests to share a forward pass; where batches take long, up to a twentieth of
    that for as many requests as the last one had."""

    stream_interval_s: float = 0.05
    """Send the text of a stream in pieces this far apart, the first at once; 0: every token by itself."""

    max_queued_requests: int = 256
    """Requests that may wait for a replica; more are answered 503."""

    max_new_tokens: int = 512
    """Tokens of an answer where the client sets no limit."""

    max_new_tokens_limit: int = 4096
    """Largest limit that a client may set."""

    max_prompt_chars: int = 200_000
    """Characters of all texts of a request, at most."""

    max_images: int = 8
    """Images of a request, at most."""

    max_image_pixels: int = 16_000_000
    """Width x height of an image, at most."""

    max_body_bytes: int = 33_554_432
    """Size of a request and of each image it names by URL, at most."""

    image_timeout_s: float = 10.0
    """Time to fetch an image by URL, redirects included."""

    allow_private_image_urls: bool = False
    """Fetch images from loopback, private and link-local addresses too. Only where clients are trusted."""

    drain_timeout_s: float = 60.0
    """Time for requests in progress when the server is told to stop."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "WARNING"
    """Verbosity of the log."""

    def __post_init__(self) -> None:
        _not_empty(self)
        ModelConfig.__post_init__(self)
        _at_least(
            self, 1, "max_adapters", "target_ongoing_requests", "max_batch_size", "max_batch_tokens",
            "max_new_tokens", "max_new_tokens_limit", "max_prompt_chars", "max_image_pixels",
            "max_body_bytes",
        )  # fmt: skip
        _at_least(
            self, 0, "port", "gpus_per_replica", "upscale_delay_s", "downscale_delay_s",
            "batch_wait_timeout_s", "stream_interval_s", "max_queued_requests", "max_images",
            "image_timeout_s", "drain_timeout_s",
        )  # fmt: skip
        if self.max_new_tokens > self.max_new_tokens_limit:
            raise ValueError(
                f"--max_new_tokens {self.max_new_tokens} is above --max_new_tokens_limit "
                f"{self.max_new_tokens_limit}"
            )
        self.replica_range()
        self.adapter_paths()

    @property
    def base_name(self) -> str:
        """Name that clients ask the base model by."""
        return self.served_model_name or self.model_id

    def replica_range(self) -> tuple[int, int] | None:
        """Return the smallest and largest number of replicas, or None where the cluster decides."""
        return _replica_range(self.num_replicas, least=0)

    def adapter_paths(self) -> dict[str, str]:
        """Return folder or URI of each adapter given by name."""
        found: dict[str, str] = {}
        for entry in (self.adapters or "").split(",") if self.adapters else []:
            name, _, path = (part.strip() for part in entry.partition("="))
            if not name or not path:
                raise ValueError(f"--adapters has {entry!r}; expected name=folder, with commas between them")
            if name in found or name == self.base_name:
                raise ValueError(f"--adapters: the name {name!r} is given twice")
            found[name] = path
        return found


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model, alone or with an adapter, under the name that a comparison gives it."""

    name: str
    model_id: str
    adapter: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkConfig(QuestionsConfig):
    """Compare models and adapters on a visual-question dataset: how right they are, and how fast."""

    # Not options here: --models and --metrics say it.
    model_id: str = dataclasses.field(default="several", init=False)
    metric: str | None = dataclasses.field(default=None, init=False)

    models: str
    """What is compared: 'base=MODEL,tuned=MODEL+ADAPTER'; the others are compared with the first. With
    --endpoint: the names it serves them by."""

    dataset_split: str = "test"
    """Split to answer."""

    sample_slices: str = "[:]"
    """Rows to answer, as Python slices: '[:100]', '[:]', '[::10]'."""

    metrics: str | None = None
    """Metrics of the answers, the first one decides: 'relaxed_accuracy,anls,rouge,bleu'; none: measure speed
    alone; default: the dataset's own, exact_match, anls and token_f1."""

    max_new_tokens: int = 64
    """Tokens to generate per answer, at most."""

    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""

    output_dir: str = "outputs/benchmark"
    """Where answers and report go: a local folder. The same command with the same folder goes on."""

    endpoint: str | None = None
    """Ask the OpenAI-compatible server at this URL instead of starting one. Its key: VLMRAY_API_KEY."""

    offline: bool = False
    """Answer by the batch pipeline instead of a server; speed under load is then not measured."""

    concurrency: str = "1,8"
    """Requests in flight, for each measurement of speed; the answers are asked for with the largest."""

    request_rate: str | None = None
    """Measure speed at these requests per second, sent at random times, instead of at --concurrency."""

    speed_samples: int = 64
    """Requests of each measurement of speed, after those that warm up; 0: do not measure it."""

    price_per_hour: float | None = None
    """Price of the machines, in any currency, for the cost of 1,000 samples."""

    baseline: str | None = None
    """A results.json of an earlier run on the same samples: each model is also compared with the one that
    had its name."""

    engine: Literal["transformers", "fake"] = "transformers"
    """What generates: transformers, or a scripted stand-in for tests."""

    batch_size: int = 16
    """Requests that share a forward pass, at most."""

    num_replicas: str | None = None
    """Model replicas: N, or MIN,MAX to scale with the load; default: one per GPU, or one without GPUs."""

    gpus_per_replica: float | None = None
    """GPUs of each replica (0.5: half of one, memory too); default: 1 where the cluster has GPUs, else 0."""

    def __post_init__(self) -> None:
        QuestionsConfig.__post_init__(self)
        _at_least(self, 1, "max_new_tokens", "batch_size")
        _at_least(self, 0, "temperature", "speed_samples", "price_per_hour", "gpus_per_replica")
        if self.offline and (self.endpoint or self.request_rate):
            raise ValueError("--offline asks no server; leave out --endpoint and --request_rate")
        if "://" in self.output_dir:
            raise ValueError(f"--output_dir {self.output_dir} must be a local folder")
        if self.metrics == "none" and (self.offline or not self.speed_samples):
            raise ValueError("--metrics none leaves nothing to do without a measurement of speed")
        if self.metrics == "none" and self.baseline:
            raise ValueError("--baseline compares scores; --metrics none has none")
        self.candidates()
        self.loads()
        _replica_range(self.num_replicas, least=1)

    def candidates(self) -> tuple[Candidate, ...]:
        """Return the models, the one that the others are compared with first."""
        found: dict[str, Candidate] = {}
        for entry in self.models.split(","):
            name, _, model = (part.strip() for part in entry.partition("="))
            if not NAME.fullmatch(name) or not model:
                raise ValueError(
                    f"--models has {entry!r}; expected name=model or name=model+adapter, with commas between "
                    "them and names of letters, digits and .-_"
                )
            if name in found:
                raise ValueError(f"--models: the name {name!r} is given twice")
            model_id, _, adapter = model.partition("+")
            if self.endpoint and adapter:
                raise ValueError(f"--models {entry}: a server's models have one name each; pass name=NAME")
            found[name] = Candidate(name, model_id, adapter or None)
        return tuple(found.values())

    def loads(self) -> tuple[float, ...]:
        """Return the loads to measure speed at: requests per second, or else requests in flight."""
        if self.request_rate is not None:
            return _numbers("request_rate", self.request_rate, float)
        return _numbers("concurrency", self.concurrency, int)

    @property
    def most_in_flight(self) -> int:
        """Requests in flight while the answers are asked for."""
        return int(max(_numbers("concurrency", self.concurrency, int)))


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """Teach the built-in model a family of questions that it does not know, and compare before and after."""

    family: str = "naming"
    """Family of chart questions to teach; see vlmray/charts.py for all of them."""

    num_charts: int = 200
    """Held-out charts that are answered before and after, with one question of every family each."""

    max_steps: int = 100
    """Optimizer steps of the training."""

    output_dir: str = "outputs/demo"
    """Where results and report go: a local folder. The same command with the same folder goes on."""

    overwrite: bool = False
    """Delete what an earlier run left in --output_dir instead of going on with it."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Verbosity of the log."""

    def __post_init__(self) -> None:
        _not_empty(self)
        _at_least(self, 1, "num_charts", "max_steps")


def _numbers(name: str, text: str, kind: type[int] | type[float]) -> tuple[float, ...]:
    try:
        numbers = tuple(kind(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise ValueError(f"--{name} must be numbers above 0 with commas between them, got {text!r}")
    return numbers


def _replica_range(num_replicas: str | None, *, least: int) -> tuple[int, int] | None:
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


def _not_empty(config: Any, *, except_for: str = "") -> None:
    for field in dataclasses.fields(config):
        if getattr(config, field.name) == "" and field.name != except_for:
            raise ValueError(f"--{field.name} is empty")


def _at_least(config: object, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= minimum:  # so written, it refuses NaN too
            raise ValueError(f"--{name} must be at least {minimum}, got {value}")
