"""One training worker: model, data and trainer put together; the same with Ray and without.

    TrainingRun -> train_loop_per_worker -> checkpoints, Outcome
                        |
                     Worker: where samples come from and checkpoints go

On Ray Train a worker is one of several (`vlmray.finetune`); in a plain process it is the whole run, which
is how training is measured and tested alone.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from PIL.Image import Image
from transformers import EarlyStoppingCallback, HfArgumentParser, set_seed
from trl import SFTConfig

from vlmray import lora
from vlmray.batches import BatchPlan
from vlmray.collator import DataCollatorForVLMSFT
from vlmray.config import FinetuneConfig
from vlmray.conversations import Conversations, Features, open_images, to_feature
from vlmray.engines import resolve_model_id
from vlmray.model import load_qwen_vl_model_and_processor
from vlmray.trainer import ERRORS_FILE, PlannedBatches, RunCallback, VLMTrainer

logger = logging.getLogger(__name__)

TRAIN, EVALUATION = "train", "evaluation"

NUM_PROBES = 8
"""Samples whose answers go with every checkpoint, to be compared with those of the loaded adapter."""

_SET_BY_VLMRAY = (
    "output_dir", "max_length", "packing", "padding_free", "packing_strategy", "eval_packing",
    "assistant_only_loss", "completion_only_loss", "remove_unused_columns", "dataset_kwargs",
    "dataset_text_field", "dataset_num_proc", "shuffle_dataset", "dataloader_num_workers",
    "dataloader_drop_last", "train_sampling_strategy", "ignore_data_skip", "eval_strategy", "eval_on_start",
    "save_strategy", "logging_strategy", "do_train", "do_eval", "do_predict", "metric_for_best_model",
    "greater_is_better", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_token",
    "warmup_steps", "data_seed", "disable_tqdm", "label_names", "use_cpu", "save_only_model",
    "model_init_kwargs", "chat_template_path", "eos_token", "pad_token", "auto_find_batch_size", "fp16",
    "average_tokens_across_devices",
)  # fmt: skip
"""Fields of SFTConfig that are decided here or make no sense with images, planned batches or Ray."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """The samples of a run; they stay where their source can be read."""

    train: Conversations
    evaluation: Conversations | None = None

    def of(self, name: str) -> Conversations:
        """Return the samples that `train` or `evaluation` stands for."""
        samples = self.train if name == TRAIN else self.evaluation
        assert samples is not None
        return samples


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """A run before it starts, as every worker gets it: everything checked, nothing loaded, no samples."""

    config: FinetuneConfig
    num_samples: int
    num_eval_samples: int
    metric: str
    image_optional: bool
    num_workers: int = 1
    num_threads: int | None = None
    """CPU threads of each worker; None leaves torch's own choice."""

    @classmethod
    def of(cls, config: FinetuneConfig, data: TrainingData, **options: Any) -> TrainingRun:
        """Describe a run over some samples."""
        return cls(
            config=config,
            num_samples=len(data.train),
            num_eval_samples=len(data.evaluation or ()),
            metric=data.train.spec.metric,
            image_optional=data.train.spec.image_optional or data.train.spec.image_column is None,
            **options,
        )

    @property
    def eval_metric(self) -> str:
        """Name in the history by which evaluations are compared."""
        return f"eval_{self.metric}" if self.config.eval_samples else "eval_loss"

    def plan(self, name: str, world_size: int) -> BatchPlan:
        """Return the order of the samples: shuffled to train on, as they come to evaluate on."""
        config = self.config
        if name == EVALUATION:
            return BatchPlan(
                num_samples=self.num_eval_samples,
                batch_size=config.per_device_eval_batch_size,
                world_size=world_size,
            )
        return BatchPlan(
            num_samples=self.num_samples,
            batch_size=config.per_device_train_batch_size,
            world_size=world_size,
            accumulation=config.gradient_accumulation_steps,
            seed=config.seed,
        )

    @property
    def samples_per_step(self) -> int:
        """Samples of all workers in one optimizer step."""
        return self.plan(TRAIN, self.num_workers).samples_per_step

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.plan(TRAIN, self.num_workers).num_steps(
            self.config.num_train_epochs, self.config.max_steps
        )


class Worker(Protocol):
    """What a training worker needs of its surroundings."""

    rank: int
    world_size: int

    def read(self, name: str, start: int, stop: int) -> Iterator[Features]:
        """Yield the samples of this worker's batches `start` to `stop`; `name` is train or evaluation."""
        ...

    def checkpoint(self) -> AbstractContextManager[Path | None]:
        """Give the last checkpoint as a local folder, or None where training begins."""
        ...

    def save(self, metrics: Mapping[str, float], folder: Path) -> None:
        """Keep a checkpoint; every worker calls it with its part. The folder is its own to consume."""
        ...

    def tell(self, **progress: Any) -> None:
        """Say how far training is."""
        ...


class LocalWorker:
    """The only worker of a run in this process. Checkpoints stay in `folder`, the last one alone.

    Args:
        run: What to do.
        data: What to train on.
        folder: Where to keep the checkpoint; None keeps none.
    """

    rank = 0
    world_size = 1

    def __init__(self, run: TrainingRun, data: TrainingData, folder: Path | None = None) -> None:
        self._run = run
        self._data = data
        self._folder = folder

    def read(self, name: str, start: int, stop: int) -> Iterator[Features]:
        samples = self._data.of(name)
        for batch in self._run.plan(name, self.world_size).batches(self.rank, start, stop):
            yield [to_feature(row) for row in open_images(samples.read(batch))]

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        found = self._folder is not None and (self._folder / "trainer_state.json").is_file()
        yield self._folder if found else None

    def save(self, metrics: Mapping[str, float], folder: Path) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            shutil.move(folder, self._folder)

    def tell(self, **progress: Any) -> None:
        """Say nothing: whoever runs it alone reads the outcome."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run leaves beside its checkpoints, as plain values."""

    history: list[dict[str, Any]]
    """The trainer's log: every step that was logged, once."""

    num_steps: int
    num_trained_here: int
    """Samples trained since the run was last started."""

    training_s: float
    """Seconds they took, without evaluations and checkpoints."""

    num_trainable: int
    num_parameters: int
    targets: list[str]
    """Adapted modules; empty where all parameters were trained."""

    errors: dict[str, str]
    """Why samples were left out, by sample id."""

    answered: list[dict[str, Any]]
    """Evaluation samples with their last answers."""

    too_many_errors: int | None = None


class TrainingMistake(ValueError):
    """Options that the model or the machine does not allow; every worker raises it, before training."""


def train_loop_per_worker(config: Mapping[str, Any], worker: Worker | None = None) -> Outcome:
    """Train as one of the workers of a run, from its last checkpoint to its end.

    Args:
        config: `{"run": TrainingRun}`, and `"data": TrainingData` where no worker is given.
        worker: This worker's surroundings; without one this process is the whole run.

    Raises:
        TrainingMistake: the model cannot be trained this way.
    """
    run: TrainingRun = config["run"]
    worker = worker or LocalWorker(run, config["data"])
    with tempfile.TemporaryDirectory(prefix="vlmray-") as scratch:
        session, mistake = None, None
        try:
            session = WorkerSession(run, worker, Path(scratch))
        except (ValueError, FileNotFoundError) as error:
            mistake = str(error)
        # A worker that left alone would leave the others waiting for it.
        mistakes = [found for found in gather_object([mistake]) if found]
        if session is None or mistakes:
            raise TrainingMistake(mistakes[0])
        return session.train()


class WorkerSession:
    """Model and trainer of one worker, from loading to the end of training.

    Args:
        run: What to do.
        worker: This worker's surroundings.
        scratch: Folder for checkpoints until they are handed over.
    """

    def __init__(self, run: TrainingRun, worker: Worker, scratch: Path) -> None:
        self.run = run
        self.worker = worker
        self.probes: list[Mapping[str, Any]] = []
        if run.num_threads is not None:
            torch.set_num_threads(run.num_threads)
        config = run.config
        self.arguments = sft_arguments(run, scratch)
        set_seed(config.seed)
        model, processor = load_model(config, self.arguments)
        processor.tokenizer.padding_side = "right"
        self.lora_config = lora_config_of(config) if config.use_peft else None
        self.targets = lora.find_lora_targets(model, self.lora_config) if self.lora_config else []
        if config.freeze_vision:
            lora.freeze_vision(model)
        self.collator = DataCollatorForVLMSFT(processor, max_length=config.max_length)
        self.model, self.processor = model, processor

    def train(self) -> Outcome:
        """Train from the last checkpoint to the end."""
        with self.worker.checkpoint() as folder:
            first_step = self._restore(folder)
            trainer, callback = self._trainer(first_step)
            started = time.perf_counter()
            trainer.train(resume_from_checkpoint=None if folder is None else str(folder))
            elapsed_s = time.perf_counter() - started
        num_trainable, num_parameters = lora.count_parameters(trainer.accelerator.unwrap_model(trainer.model))
        return Outcome(
            history=trainer.state.log_history,
            num_steps=trainer.state.global_step,
            num_trained_here=(trainer.state.global_step - first_step) * self.run.samples_per_step,
            training_s=elapsed_s - trainer.evaluation_s - callback.saving_s,
            num_trainable=num_trainable,
            num_parameters=num_parameters,
            targets=self.targets,
            errors=_merge(gather_object([{**self.collator.errors, **trainer.eval_errors}])),
            answered=sorted(trainer.answered, key=lambda row: row["sample_id"]),
            too_many_errors=callback.too_many_errors,
        )

    def _restore(self, folder: Path | None) -> int:
        """Take up what the trainer's own checkpoint does not hold; return the steps done before."""
        if folder is None:
            return 0
        errors = folder / ERRORS_FILE.format(rank=self.worker.rank)
        if errors.is_file():
            self.collator.errors.update(json.loads(errors.read_text(encoding="utf-8")))
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        return int(state["global_step"])

    def _trainer(self, first_step: int) -> tuple[VLMTrainer, RunCallback]:
        run, config, worker = self.run, self.run.config, self.worker
        plan = run.plan(TRAIN, worker.world_size)
        first, last = first_step * plan.accumulation, run.num_steps * plan.accumulation
        batches = PlannedBatches(
            worker.read(TRAIN, first, last), self._collate, plan.batches_per_epoch, first
        )
        callback = RunCallback(worker, self.collator, config.max_errors)
        trainer = VLMTrainer(
            model=self.model,
            args=self.arguments,
            processing_class=self.processor,
            collator=self.collator,
            peft_config=self.lora_config,
            callbacks=[*_early_stopping(config), callback],
            batches=batches,
            read_evaluation=self._read_evaluation if run.num_eval_samples else None,
            metric=run.metric,
            num_answered=config.eval_samples,
            max_new_tokens=config.max_new_tokens,
        )
        callback.answer_probes = lambda: _with_images(self.probes, trainer.answer(self.probes))
        return trainer, callback

    def _collate(self, features: Features) -> dict[str, torch.Tensor]:
        """Make a batch, and keep the first samples to ask them about later."""
        good = (f for f in features if f is not None and "error" not in f)
        self.probes += islice(good, NUM_PROBES - len(self.probes))
        return self.collator(features)

    def _read_evaluation(self) -> Iterator[Features]:
        plan = self.run.plan(EVALUATION, self.worker.world_size)
        return self.worker.read(EVALUATION, 0, plan.batches_per_epoch)


def load_model(config: FinetuneConfig, arguments: SFTConfig) -> tuple[Any, Any]:
    """Load the base for training, on this worker's device."""
    dtype = config.dtype
    if dtype == "auto" and not config.use_peft:
        dtype = "float32"  # the optimizer's steps are too small for bfloat16 weights
    model, processor = load_qwen_vl_model_and_processor(
        resolve_model_id(config.model_id),
        quantization=config.quantization,
        dtype=dtype,
        device_map=None if config.fsdp else {"": arguments.device.index or 0},
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
        trust_remote_code=config.trust_remote_code,
    )
    if config.quantization != "none":
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=arguments.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
    return model, processor


def lora_config_of(config: FinetuneConfig) -> Any:
    """Return the LoRA configuration that the options ask for."""
    return lora.get_default_lora_config_for_qwen_vl(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        lora_vision=config.lora_vision,
        lora_merger=config.lora_merger,
    )


def sft_arguments(run: TrainingRun, scratch: Path) -> SFTConfig:
    """Translate the options into TRL's.

    Raises:
        ValueError: bfloat16 where this worker's device has none.
    """
    config = run.config
    on_gpu = torch.cuda.is_available()
    has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.bf16 and not has_bf16:
        found = torch.cuda.get_device_name() if on_gpu else "no GPU"
        raise ValueError(f"--bf16 needs a GPU with bfloat16 (Ampere or newer), found {found}; leave it out")
    checkpointing = on_gpu if config.gradient_checkpointing is None else config.gradient_checkpointing
    evaluates = run.num_eval_samples > 0
    options: dict[str, Any] = {
        "output_dir": str(scratch),
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "per_device_eval_batch_size": config.per_device_eval_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "learning_rate": config.learning_rate,
        "max_steps": run.num_steps,
        "warmup_steps": config.warmup_ratio,  # transformers 5 reads a number below 1 as a share
        "lr_scheduler_type": config.lr_scheduler_type,
        "weight_decay": config.weight_decay,
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        "bf16": has_bf16 if config.bf16 is None else config.bf16,
        "logging_steps": config.logging_steps,
        "logging_nan_inf_filter": False,  # a loss that is not a number must show
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": config.eval_steps,
        "eval_on_start": evaluates,
        "metric_for_best_model": run.eval_metric if evaluates else None,
        "greater_is_better": run.eval_metric != "eval_loss",
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "seed": config.seed,
        "report_to": config.report_to,
        "use_cpu": not on_gpu,
        "max_length": None,  # a row is trained whole or not at all: see the collator
        "packing": False,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "log_level": "error",
        # Every batch holds an image, so every trained parameter takes part; looking for others costs time.
        "ddp_find_unused_parameters": run.image_optional,
        **({"fsdp": True} if config.fsdp else {}),
        **parse_sft_config(config.sft_config),
    }
    return SFTConfig(**options)


def parse_sft_config(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Check further fields of SFTConfig and convert their values as transformers' own scripts would.

    Raises:
        ValueError: a field that does not exist, is decided elsewhere, or takes no such value.
    """
    own = {field.name for field in fields(FinetuneConfig)}
    known = {field.name for field in fields(SFTConfig)}
    words: list[str] = []
    for name, value in (given or {}).items():
        if name in own:
            raise ValueError(f"--sft_config: {name} has an option of its own, --{name}")
        if name in _SET_BY_VLMRAY:
            raise ValueError(f"--sft_config: {name} is set by vlmray and cannot be changed here")
        if name not in known:
            raise ValueError(f"--sft_config: SFTConfig has no field {name!r}; see TRL's documentation")
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(json.dumps(v) if isinstance(v, dict | bool) else str(v) for v in values)]
    parser = HfArgumentParser(SFTConfig)  # type: ignore[arg-type]

    def refuse(message: str) -> None:
        raise ValueError(f"--sft_config: {re.sub(r'^argument --', '', message)}")

    parser.error = refuse  # type: ignore[method-assign,assignment]
    parsed = vars(parser.parse_args(["--output_dir", "unused", *words]))
    return {name: parsed[name] for name in given or ()}


def _early_stopping(config: FinetuneConfig) -> list[EarlyStoppingCallback]:
    patience = config.early_stopping_patience
    return [] if patience is None else [EarlyStoppingCallback(early_stopping_patience=patience)]


def _with_images(probes: list[Mapping[str, Any]], answered: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Complete answered samples by what it takes to ask them again elsewhere."""
    return [
        {
            **row,
            "messages": feature["messages"],
            "images": [_encode_png(image) for image in feature["images"]],
        }
        for feature, row in zip(probes, answered, strict=True)
    ]


def _encode_png(image: Image) -> str:
    """Encode an image without loss, as text."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _merge(parts: list[dict[str, str]]) -> dict[str, str]:
    return {name: message for part in parts for name, message in sorted(part.items())}
