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
import functools
import io
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from PIL.Image import Image
from transformers import EarlyStoppingCallback, set_seed
from trl import SFTConfig

from vlmray.config import FinetuneConfig
from vlmray.errors import one_line
from vlmray.models import lora
from vlmray.models.loading import load_checkpoint
from vlmray.models.source import resolve_model_id
from vlmray.training.arguments import optimizer_of, sft_arguments
from vlmray.training.collator import DataCollatorForVLMSFT
from vlmray.training.run import EVALUATION, TRAIN, TrainingData, TrainingRun
from vlmray.training.samples import Features, open_images, to_feature
from vlmray.training.trainer import PlannedBatches, RunCallback, VLMTrainer

NUM_PROBES = 8
"""Samples whose answers go with every checkpoint, to be compared with those of the loaded adapter."""

# What a checkpoint holds beside the trainer's own files:
ANSWERS_FILE = "answers.json"  # the probes, as the model of this checkpoint answers them
EVALUATED_FILE = "evaluated.json"  # what the last evaluation answered
ERRORS_FILE = "errors-{rank}.json"  # why samples of a worker were left out: {"train": ..., "evaluation": ...}


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
    with tempfile.TemporaryDirectory(prefix="vlmray-") as scratch, worker.checkpoint() as folder:
        session, mistake = None, None
        try:
            session = WorkerSession(run, worker, Path(scratch), folder)
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
        self.folder = folder
        self.trainer, self.callback, self.first_step = self._trainer(folder)

    def train(self) -> Outcome:
        """Train from the last checkpoint to the end."""
        run, trainer, callback, first_step = self.run, self.trainer, self.callback, self.first_step
        started = time.perf_counter()
        try:
            trainer.train(resume_from_checkpoint=None if self.folder is None else str(self.folder))
        except (ImportError, TypeError, ValueError) as error:
            if callback.begun:
                raise
            # Every worker comes to know here that its options make no optimizer or no schedule.
            raise TrainingMistake(one_line(error, 1000)) from error
        elapsed_s = time.perf_counter() - started
        num_trainable, num_parameters = lora.count_parameters(trainer.accelerator.unwrap_model(trainer.model))
        num_steps = trainer.state.global_step
        errors = _merge(gather_object([self.collator.errors]))
        cache = trainer.vision_cache
        counts = gather_object([(cache.num_images, cache.num_encoded)]) if cache is not None else None
        num_images, num_encoded = map(sum, zip(*counts, strict=True)) if counts else (None, None)
        too_many = run.config.max_errors is not None and len(errors) > run.config.max_errors
        return Outcome(
            history=trainer.state.log_history,
            num_steps=num_steps,
            num_trained_here=run.num_samples_of(num_steps) - run.num_samples_of(first_step),
            training_s=elapsed_s - trainer.evaluation_s - trainer.saving_s - callback.saving_s,
            step_ends=callback.step_ends,
            num_trainable=num_trainable,
            num_parameters=num_parameters,
            targets=self.targets,
            errors=errors,
            eval_errors=_merge(gather_object([trainer.eval_errors])),
            num_images=num_images,
            num_encoded=num_encoded,
            answered=sorted(trainer.answered, key=lambda row: row["sample_id"]),
            too_many_errors=len(errors) if too_many else None,
        )

    def _trainer(self, folder: Path | None) -> tuple[VLMTrainer, RunCallback, int]:
        """Make the trainer of the steps still to do; return the steps done before too."""
        run, config, worker = self.run, self.run.config, self.worker
        state = {} if folder is None else _read_json(folder / "trainer_state.json")
        first_step = state.get("global_step", 0)
        early_stopping, stopped = _early_stopping(config, state)
        plan = run.plan(TRAIN, worker.world_size)
        first = first_step * plan.accumulation
        last = first if stopped else run.num_steps * plan.accumulation
        batches = PlannedBatches(
            worker.read(TRAIN, first, last), self._collate, plan.batches_per_epoch, first
        )
        callback = RunCallback(worker, self.collator, config.max_errors)
        self.arguments.eval_on_start &= folder is None
        trainer = VLMTrainer(
            model=self.model,
            args=self.arguments,
            processing_class=self.processor,
            collator=self.collator,
            peft_config=self.lora_config,
            optimizer_cls_and_kwargs=optimizer_of(config, self.arguments),
            callbacks=[*early_stopping, callback],
            batches=batches,
            read_evaluation=self._read_evaluation if run.num_eval_samples else None,
            vision_cache_bytes=config.vision_cache_gib * 2**30,
            epochs_repeat=run.num_steps > plan.steps_per_epoch,
            metric=run.metric,
            num_answered=config.eval_samples,
            max_new_tokens=config.max_new_tokens,
        )
        callback.complete = functools.partial(self._complete, trainer)
        if folder is not None:
            self._restore(trainer, folder)
        return trainer, callback, first_step

    def _complete(self, trainer: VLMTrainer, folder: Path) -> None:
        """Add to a checkpoint what its artifacts and a resumed run need beside the trainer's own files."""
        errors = {TRAIN: dict(self.collator.errors), EVALUATION: trainer.eval_errors}
        _write_json(folder / ERRORS_FILE.format(rank=self.worker.rank), errors)
        if self.worker.rank == 0:
            probes = list(self.probes)  # the collator's thread may be adding to them
            _write_json(folder / ANSWERS_FILE, _with_images(probes, trainer.answer(probes)))
            _write_json(folder / EVALUATED_FILE, trainer.answered)

    def _restore(self, trainer: VLMTrainer, folder: Path) -> None:
        """Take up what `_complete` wrote, by as many workers as there were or others."""
        for path in folder.glob(ERRORS_FILE.format(rank="*")):
            rank = int(path.stem.rpartition("-")[2])
            if rank % self.worker.world_size == self.worker.rank:
                errors = _read_json(path)
                self.collator.errors.update(errors[TRAIN])
                trainer.eval_errors.update(errors[EVALUATION])
        trainer.answered = _read_json(folder / EVALUATED_FILE)

    def _collate(self, features: Features) -> dict[str, torch.Tensor]:
        """Make a batch, and keep the first samples that can be trained on to ask them about later."""
        batch = self.collator(features)
        if len(self.probes) < NUM_PROBES:
            passed_over = {*self.collator.errors, *(probe["sample_id"] for probe in self.probes)}
            good = (f for f in features if f is not None and f["sample_id"] not in passed_over)
            self.probes += islice(good, NUM_PROBES - len(self.probes))
        return batch

    def _read_evaluation(self) -> Iterator[Features]:
        plan = self.run.plan(EVALUATION, self.worker.world_size)
        return self.worker.read(EVALUATION, 0, plan.batches_per_epoch)


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


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _merge(parts: list[dict[str, str]]) -> dict[str, str]:
    return {name: message for part in parts for name, message in sorted(part.items())}
