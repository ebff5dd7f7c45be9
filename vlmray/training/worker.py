"""One training worker: model, data and trainer put together; the same with Ray and without.

    TrainingRun -> train_loop_per_worker -> checkpoints, Outcome
                        |
                     Worker: where samples come from and checkpoints go

On Ray Train a worker is one of several (`vlmray.finetune`); in a plain process it is the whole run, which
is how training is measured and tested alone.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from transformers import EarlyStoppingCallback, set_seed
from trl import SFTConfig

from vlmray.config import FinetuneConfig
from vlmray.engines.rows import end_ids
from vlmray.errors import one_line
from vlmray.models import lora
from vlmray.models.families import family_of
from vlmray.models.loading import find_max_model_len, load_checkpoint
from vlmray.models.source import resolve_model_id
from vlmray.storage.scratch import scratch_folder
from vlmray.training.arguments import sft_arguments
from vlmray.training.checkpoint import STATE_FILE, CheckpointWriter, Earlier, Probes
from vlmray.training.collator import DataCollatorForVLMSFT
from vlmray.training.evaluation import Evaluation
from vlmray.training.optimizers import optimizer_of
from vlmray.training.run import EVALUATION, TRAIN, TrainingData, TrainingRun
from vlmray.training.samples import Features, open_images, to_feature
from vlmray.training.trainer import PlannedBatches, RunCallback, VLMTrainer
from vlmray.training.vision_cache import VisionCache


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

    def must_save(self) -> bool:
        """Tell, to all workers alike, whether a machine of the run is about to be taken: once for each."""
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
        """Yield the samples of batches, read here and now."""
        samples = self._data.of(name)
        for batch in self._run.plan(name, self.world_size).batches(self.rank, start, stop):
            yield [to_feature(row) for row in open_images(samples.read(batch))]

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        """Give the kept checkpoint."""
        found = self._folder is not None and (self._folder / STATE_FILE).is_file()
        yield self._folder if found else None

    def save(self, metrics: Mapping[str, float], folder: Path) -> None:
        """Keep a checkpoint in place of the last."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            shutil.move(folder, self._folder)

    def tell(self, **progress: Any) -> None:
        """Say nothing: whoever runs it alone reads the outcome."""

    def must_save(self) -> bool:
        """Nobody tells a plain process."""
        return False


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

    step_ends: list[float]
    """Clock in seconds at the end of each step since then."""

    num_trainable: int
    num_parameters: int
    targets: list[str]
    """Adapted modules; empty where all parameters were trained."""

    errors: dict[str, str]
    """Why samples were left out of training, by sample id."""

    eval_errors: dict[str, str]
    """Why samples were left out of the evaluation's loss, by sample id."""

    num_images: int | None
    """Images of batches since then, evaluations included; None where gradients go through the tower."""

    num_encoded: int | None
    """How many of them the vision tower had to encode."""

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
    with scratch_folder() as scratch, worker.checkpoint() as folder:
        session, mistake = None, None
        try:
            session = WorkerSession(run, worker, scratch, folder)
        except (ValueError, FileNotFoundError, ImportError) as error:
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
        folder: Checkpoint to go on from, or None.
    """

    def __init__(self, run: TrainingRun, worker: Worker, scratch: Path, folder: Path | None = None) -> None:
        config = run.config
        if run.num_threads is not None:
            torch.set_num_threads(run.num_threads)
        arguments = sft_arguments(run, scratch, worker.world_size, goes_on=folder is not None)
        model, processor, targets = load_trainable(config, arguments)
        plan = run.plan(TRAIN, worker.world_size)
        earlier = Earlier.read(folder, worker.rank, worker.world_size)
        # Sharded weights cannot be used outside of the whole model's forward pass.
        cache = None if config.fsdp else VisionCache.of(model, config.vision_cache_gib * 2**30)
        collator = functools.partial(
            DataCollatorForVLMSFT,
            processor,
            family=family_of(model.config),
            end_ids=end_ids(model.generation_config),
            max_length=config.max_length,
            max_model_len=find_max_model_len(model.config),
            train_on=config.train_on or "all",
        )
        self.collator = collator(
            vision_cache=cache if run.num_steps > plan.steps_per_epoch else None,
            errors=earlier.errors,
        )
        self.evaluation = Evaluation(
            read=functools.partial(_read_evaluation, run, worker) if run.num_eval_samples else None,
            collator=collator(vision_cache=cache, errors=earlier.eval_errors),
            metric=run.metric,
            num_answered=config.eval_samples,
            batch_size=config.per_device_eval_batch_size,
            max_new_tokens=config.max_new_tokens,
            answered=earlier.answered,
        )
        probes = Probes(self.collator)
        writer = CheckpointWriter(
            rank=worker.rank, errors=self.collator.errors, probes=probes, evaluation=self.evaluation
        )
        early_stopping, stopped = _early_stopping(config, earlier.state)
        first = earlier.step * plan.accumulation
        last = first if stopped else run.num_steps * plan.accumulation
        self.callback = RunCallback(worker, self.collator, config.max_errors, writer)
        self.trainer = VLMTrainer(
            model=model,
            args=arguments,
            processing_class=processor,
            data_collator=self.collator,
            optimizer_cls_and_kwargs=optimizer_of(config, arguments),
            callbacks=[*early_stopping, self.callback],
            batches=PlannedBatches(
                worker.read(TRAIN, first, last), probes.collate, plan.batches_per_epoch, first
            ),
            evaluation=self.evaluation,
            vision_cache=cache,
        )
        self._run, self._folder, self._cache = run, folder, cache
        self._targets, self._first_step = targets, earlier.step

    def train(self) -> Outcome:
        """Train from the last checkpoint to the end."""
        run, trainer, callback = self._run, self.trainer, self.callback
        started = time.perf_counter()
        try:
            trainer.train(resume_from_checkpoint=None if self._folder is None else str(self._folder))
        except (ImportError, TypeError, ValueError) as error:
            if callback.begun:
                raise
            # Every worker comes to know here that its options make no optimizer or no schedule.
            raise TrainingMistake(one_line(error, 1000)) from error
        elapsed_s = time.perf_counter() - started
        num_trainable, num_parameters = lora.count_parameters(trainer.accelerator.unwrap_model(trainer.model))
        num_steps = trainer.state.global_step
        errors = _merge(gather_object([self.collator.errors]))
        cache = self._cache
        counts = gather_object([(cache.num_images, cache.num_encoded)]) if cache is not None else None
        num_images, num_encoded = map(sum, zip(*counts, strict=True)) if counts else (None, None)
        too_many = run.config.max_errors is not None and len(errors) > run.config.max_errors
        return Outcome(
            history=trainer.state.log_history,
            num_steps=num_steps,
            num_trained_here=run.num_samples_of(num_steps) - run.num_samples_of(self._first_step),
            training_s=elapsed_s - trainer.evaluation_s - callback.saving_s,
            step_ends=callback.step_ends,
            num_trainable=num_trainable,
            num_parameters=num_parameters,
            targets=self._targets,
            errors=errors,
            eval_errors=_merge(gather_object([self.evaluation.collator.errors])),
            num_images=num_images,
            num_encoded=num_encoded,
            answered=sorted(self.evaluation.answered, key=lambda row: row["sample_id"]),
            too_many_errors=len(errors) if too_many else None,
        )


def _read_evaluation(run: TrainingRun, worker: Worker) -> Iterator[Features]:
    return worker.read(EVALUATION, 0, run.plan(EVALUATION, worker.world_size).batches_per_epoch)


def load_trainable(config: FinetuneConfig, arguments: SFTConfig) -> tuple[Any, Any, list[str]]:
    """Load the base and make of it what is trained: the adapter on it, or all that is not frozen.

    Returns:
        The model, its processor, and the names of adapted modules.
    """
    model, processor = load_model(config, arguments)
    processor.tokenizer.padding_side = "right"
    if config.freeze_vision:
        lora.freeze_vision(model)
    if not config.use_peft:
        return model, processor, []
    from peft import get_peft_model

    lora_config = lora_config_of(config, model)
    targets = lora.find_lora_targets(model, lora_config)
    set_seed(config.seed)  # the adapter begins with random weights
    return get_peft_model(model, lora_config), processor, targets


def load_model(config: FinetuneConfig, arguments: SFTConfig) -> tuple[Any, Any]:
    """Load the base for training, on this worker's device."""
    if config.dtype == "auto" and not config.use_peft:
        # The optimizer's steps are too small for bfloat16 weights.
        config = replace(config, dtype="float32")
    model, processor = load_checkpoint(
        resolve_model_id(config.model_id),
        config,
        device_map=None if config.fsdp else {"": arguments.device.index or 0},
    )
    if config.quantization != "none":
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=arguments.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
    return model, processor


def lora_config_of(config: FinetuneConfig, model: Any) -> Any:
    """Return the LoRA configuration that the options ask for, of a model or its skeleton."""
    return lora.get_default_lora_config_for_qwen_vl(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        lora_vision=config.lora_vision,
        lora_merger=config.lora_merger,
        family=family_of(model.config),
    )


def _early_stopping(
    config: FinetuneConfig, state: Mapping[str, Any]
) -> tuple[list[EarlyStoppingCallback], bool]:
    """Go on counting where a trainer state stopped, and tell whether patience had ended by then."""
    patience = config.early_stopping_patience
    if patience is None:
        return [], False
    callback = EarlyStoppingCallback(early_stopping_patience=patience)
    saved = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback", {}).get("attributes", {})
    callback.early_stopping_patience_counter = saved.get("early_stopping_patience_counter", 0)
    return [callback], callback.early_stopping_patience_counter >= patience


def _merge(parts: list[dict[str, str]]) -> dict[str, str]:
    return {name: message for part in parts for name, message in sorted(part.items())}
