"""TRL's `SFTTrainer`, fed by a plan and evaluated exactly.

    features (lists of samples) -> collator, a batch ahead -> SFTTrainer -> checkpoints, history
                                                                 |
                                   evaluation: loss over all answer tokens, answers of the first samples

The loop, the loss and the optimizer are TRL's and transformers'. What is ours: batches come in a planned
order and not from a sampler, the loss of a step and of an evaluation is a mean over tokens whatever the
batches were, and the model is asked through the engine that inference uses.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl.trainer.utils
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from vlmray.models.adapters import is_peft_model
from vlmray.models.loading import find_not_finite
from vlmray.training.checkpoint import CheckpointWriter
from vlmray.training.collator import DataCollatorForVLMSFT
from vlmray.training.evaluation import Evaluation, is_good
from vlmray.training.samples import Feature, Features
from vlmray.training.vision_cache import VisionCache

logger = logging.getLogger(__name__)

_AHEAD = 2
"""Batches that are made while the model works on another."""

_FAILED_AT_FIRST = 32
"""Samples after which a run ends if all have failed, which hardly happens where every second is good."""


class PlannedBatches(IterableDataset):
    """The batches of a run that are still to be trained, one epoch per iteration.

    Args:
        features: All samples still to come, a list for each batch.
        collate: Makes a batch of a list of samples; beside a GPU it runs in a thread, ahead of the model.
        per_epoch: Batches of an epoch.
        trained: Batches that were trained before, over the whole run.
    """

    def __init__(
        self, features: Iterable[Features], collate: Callable[[Features], Any], per_epoch: int, trained: int
    ) -> None:
        # On a CPU the thread would take from the model what it gives: cores.
        self._batches = _run_ahead(features, collate) if torch.cuda.is_available() else map(collate, features)
        self._per_epoch = per_epoch
        self._trained_in_epoch = trained % per_epoch

    def __len__(self) -> int:
        return self._per_epoch

    def __iter__(self) -> Iterator[Any]:
        skipped, self._trained_in_epoch = self._trained_in_epoch, 0
        # After a resume transformers skips the batches of the epoch that were trained before, unseen.
        yield from (None for _ in range(skipped))
        yield from islice(self._batches, self._per_epoch - skipped)


def _run_ahead(items: Iterable[Features], function: Callable[[Features], Any]) -> Iterator[Any]:
    """Map in order, in a thread that is a few items ahead; what it raises is raised here."""
    with ThreadPoolExecutor(1, thread_name_prefix="collate") as pool:
        pending: deque[Future[Any]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class VLMTrainer(SFTTrainer):
    """`SFTTrainer` whose batches are planned outside.

    Args:
        batches: What is to be trained.
        evaluation: How it is evaluated.
        vision_cache: What the frozen vision tower makes of images; None where the model sees pixels.
        **options: Passed to `SFTTrainer`; the model as it is to be trained, with its adapter.
    """

    def __init__(
        self,
        *,
        batches: PlannedBatches,
        evaluation: Evaluation,
        vision_cache: VisionCache | None,
        **options: Any,
    ) -> None:
        # SFTTrainer looks at one row to learn that there are images, and takes nothing from it.
        stub = Dataset.from_dict({"images": [[]], "messages": [[]]})
        super().__init__(train_dataset=stub, eval_dataset=stub if evaluation.read else None, **options)
        self.remove_callback(PrinterCallback)
        # Let TRL divide the loss by the answer tokens of the whole step. Some models (Qwen2.5-VL is one) say
        # that their own loss cannot do that, and transformers would average the batches' means instead.
        self.model_accepts_loss_kwargs = True
        self._batches = batches
        self._evaluation = evaluation
        self._vision_cache = vision_cache
        self.evaluation_s = 0.0
        """Seconds spent on evaluations."""

    def get_train_dataloader(self) -> DataLoader:
        """Return the planned batches: already collated, already this worker's."""
        return DataLoader(self._batches, batch_size=None, collate_fn=_as_it_is)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the evaluation samples of this worker, a list for each batch."""
        assert self._evaluation.read is not None
        return self._evaluation.read()

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Measure the mean loss over all answer tokens, and the metric over the first samples' answers."""
        started = time.perf_counter()
        assert self.model is not None
        self.model.eval()
        evaluation = self._evaluation
        totals = torch.zeros(2, device=self.args.device)
        asked: list[Feature] = []
        num_samples = 0
        for number, features in enumerate(dataloader):
            totals += self._sum_loss(features)
            num_samples += sum(map(is_good, features))
            # The first samples of all workers' together, so that the number of workers does not matter.
            batches_before = number * self.accelerator.num_processes + self.accelerator.process_index
            asked += evaluation.first(features, batches_before)
        loss, num_tokens = self.accelerator.reduce(totals, "sum").tolist()
        found = {f"{metric_key_prefix}_loss": loss / num_tokens if num_tokens else math.nan}
        if evaluation.num_answered:
            evaluation.answered = gather_object(evaluation.answer(self.model, asked))
            scores = [row["score"] for row in evaluation.answered if row["score"] is not None]
            mean = sum(scores) / len(scores) if scores else math.nan
            found[f"{metric_key_prefix}_{evaluation.metric}"] = mean
        self.evaluation_s += time.perf_counter() - started
        return EvalLoopOutput(np.empty(0), label_ids=None, metrics=found, num_samples=num_samples)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device, and images through the vision tower where no gradient has to."""
        inputs = super()._prepare_inputs(inputs)
        if self._vision_cache is None:
            return inputs
        with self.accelerator.autocast():  # as the forward pass
            return self._vision_cache.encode(inputs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss."""
        with _scoring_labels_alone():
            return super().compute_loss(*args, **kwargs)

    def _sum_loss(self, features: Features) -> torch.Tensor:
        """Return the summed loss and the number of answer tokens of a batch."""
        batch = self._evaluation.collator(features)
        num_tokens = int((batch["labels"][:, 1:] != -100).sum())
        loss, _, _ = self.prediction_step(self.model, batch, prediction_loss_only=True)
        return torch.stack([loss.float() * num_tokens, loss.new_tensor(num_tokens, dtype=torch.float)])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights of a checkpoint.

        transformers loads those of a whole model by name and passes over names that the model does not
        have. Of Qwen2.5-VL that is nearly all: they are saved under the names of the hub's checkpoint.
        """
        own: Any = self.model
        if is_peft_model(own) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(own).from_pretrained(resume_from_checkpoint, dtype=own.dtype, use_safetensors=True)
        own.load_state_dict(saved.state_dict())


@contextlib.contextmanager
def _scoring_labels_alone() -> Iterator[None]:
    """Let TRL's head score only positions with a label on a CPU too, as it does on a GPU.

    Elsewhere it scores all, prompt and image included, for the sake of compilers that want equal shapes.
    """
    decide = getattr(trl.trainer.utils, "_use_triton", None)
    if decide is None:
        yield
        return
    trl.trainer.utils._use_triton = lambda device: device.type == "cpu" or decide(device)
    try:
        yield
    finally:
        trl.trainer.utils._use_triton = decide


def _as_it_is(batch: Any) -> Any:
    return batch


class DivergedError(RuntimeError):
    """Training has come to values that are no numbers; every worker raises it at the same step."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(what, step)  # as given, so that it survives pickling
        self.what = what
        self.step = step

    def __str__(self) -> str:
        """Say it in one line."""
        return (
            f"{self.what} at step {self.step}, so training has diverged; lower --learning_rate or raise "
            "--warmup_ratio"
        )


class NothingLearnedError(RuntimeError):
    """No sample could be trained on; every worker raises it at the same step."""


class RunCallback(TrainerCallback):
    """Tells the run's worker how far training is, and hands it every checkpoint.

    Args:
        worker: See `vlmray.training.worker.Worker`.
        collator: Knows which samples could be trained on so far, and which could not.
        max_errors: Stop once more samples than this have failed, over all workers.
        writer: Adds to a checkpoint what the trainer does not write.
    """

    def __init__(
        self,
        worker: Any,
        collator: DataCollatorForVLMSFT,
        max_errors: int | None,
        writer: CheckpointWriter,
    ) -> None:
        self._worker = worker
        self._collator = collator
        self._learns = False
        self._max_errors = max_errors
        self._writer = writer
        self._eval_metrics: dict[str, float] = {}
        self._saving_since = 0.0  # if a checkpoint follows: the trainer writes its part and tells of it after
        self.saving_s = 0.0
        """Seconds spent on writing checkpoints and handing them over."""

        self.step_ends: list[float] = []
        self.begun = False
        """Whether all was made that training needs."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell where training begins."""
        self.begun, self._learns = True, state.global_step > 0
        self._worker.tell(step=state.global_step, num_steps=state.max_steps, started=True)
        self._saving_since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell of a step, and stop after too many errors."""
        self._saving_since = time.perf_counter()
        self.step_ends.append(self._saving_since)
        self._worker.tell(step=state.global_step, num_steps=state.max_steps)
        if not self._learns:
            self._check_that_it_learns(is_last=state.global_step >= state.max_steps)
        if self._worker.must_save():
            control.should_save = True
        if self._max_errors is not None and state.global_step % state.logging_steps == 0:
            # By name: in another epoch another worker may have met the same sample.
            failed = {name for names in gather_object([list(self._collator.errors)]) for name in names}
            if len(failed) > self._max_errors:
                control.should_training_stop = control.should_save = True

    def _check_that_it_learns(self, *, is_last: bool) -> None:
        """End a run in which all samples failed so far; one that worked shows that others may."""
        found = gather_object([(self._collator.num_encoded, list(self._collator.errors.items()))])
        self._learns = any(num_encoded for num_encoded, _ in found)
        failed = [failure for _, failures in found for failure in failures]
        if not self._learns and failed and (is_last or len(failed) >= _FAILED_AT_FIRST):
            name, reason = failed[0]
            raise NothingLearnedError(
                f"none of the first {len(failed)} samples can be trained on; {name}: {reason}"
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Tell the losses, and end what has diverged: such a model cannot be trained any further."""
        for name in ("loss", "grad_norm"):
            if not math.isfinite(value := (logs or {}).get(name, 0.0)):
                raise DivergedError(f"{name} is {value}", state.global_step)
        self._worker.tell(**{name: value for name, value in (logs or {}).items() if "loss" in name})
        self._saving_since = time.perf_counter()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Keep the metrics for the next checkpoint."""
        self._eval_metrics = {name: float(value) for name, value in (metrics or {}).items()}
        if control.should_training_stop:  # stopped early: what there is has to be kept
            control.should_save = True
        self._saving_since = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Complete the checkpoint and hand it over; every worker comes here for every checkpoint."""
        # Shards differ between workers, which have to raise together.
        weights = [(name, each) for name, each in model.named_parameters() if not hasattr(each, "to_local")]
        broken = find_not_finite((name, weight) for name, weight in weights if weight.requires_grad)
        if broken is not None:
            raise DivergedError(f"{broken} is not finite", state.global_step)
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        self._writer.write(model, folder)
        self._worker.save({"step": state.global_step, **self._eval_metrics}, folder)
        self.saving_s += time.perf_counter() - self._saving_since
