"""The fine-tuning job on Ray Train: plan a run, watch the workers train it, keep what comes out.

    config -> plan_finetune -> run_finetune: TorchTrainer -> last checkpoint -> adapter, checks, report
                                   |
                       shards -> train_loop_per_worker, one on each GPU -> checkpoints in the output folder

A worker or node that dies takes the run back to its last checkpoint, not to its start, and so does
`--resume` after the driver died.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

# ray.train has these under the same names, but its types are those of the former version.
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig
from ray.train.v2.api.result import Result

from vlmray import cluster
from vlmray.builtin.random_models import resolve_model_id
from vlmray.config import FinetuneConfig
from vlmray.dataset.selection import Questions, check_model, open_questions
from vlmray.finetune.artifacts import ADAPTER, MERGED, MODEL, training_record, write_artifacts
from vlmray.finetune.progress import Board, ProgressBar, TellFailures
from vlmray.finetune.ray_worker import Shard
from vlmray.finetune.report import Check, TrainingReport, render_training_html
from vlmray.inference.report import group_errors
from vlmray.models import checks, lora
from vlmray.reports.page import GalleryItem
from vlmray.storage.run_folder import OutputDirectory, open_filesystem
from vlmray.training.arguments import check_sft_options
from vlmray.training.run import EVALUATION, TRAIN, TrainingData, TrainingRun
from vlmray.training.samples import Conversations, Features, check_answers, group_turns
from vlmray.training.worker import Outcome, TrainingMistake, lora_config_of, train_loop_per_worker

CHECKPOINTS = "checkpoints"

# What the steps depend on, and so what --resume must find unchanged.
_STEP_OPTIONS = (
    "model_id", "quantization", "dtype", "dataset_name", "dataset_config", "dataset_split", "sample_slices",
    "max_turns", "max_length", "system_prompt", "min_pixels", "max_pixels", "seed", "use_peft", "lora_r",
    "lora_alpha", "lora_dropout", "lora_target_modules", "lora_vision", "lora_merger", "freeze_vision",
    "learning_rate", "num_train_epochs", "max_steps", "warmup_ratio", "lr_scheduler_type", "weight_decay",
    "optim", "bf16", "train_sampling_strategy", "sft_config",
)  # fmt: skip

_POLL_S = 0.2
_GALLERY_SIZE = 60


class FinetuneError(RuntimeError):
    """A run that could not go on; its checkpoints are in the output folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneRun:
    """A run that is about to start."""

    training: TrainingRun
    data: TrainingData
    workers: cluster.WorkerPlan
    folder: OutputDirectory

    @property
    def config(self) -> FinetuneConfig:
        """Options of the run."""
        return self.training.config


def plan_finetune(config: FinetuneConfig) -> FinetuneRun:
    """Check every option, open the dataset, divide the cluster and open the output folder.

    Raises:
        ValueError: an option does not fit the model, the dataset, the cluster or the output folder.
        FileNotFoundError: the model is not there.
    """
    check_model(config.model_id)
    check_sft_options(config)
    data = open_training_data(config)
    if config.use_peft:
        _check_lora_targets(config)
    cluster.connect(config.log_level)
    workers = cluster.plan_workers(config.num_workers)
    if config.fsdp and workers.num_workers == 1:
        raise ValueError("--fsdp shards over several workers, and there is one; leave it out")
    training = TrainingRun.of(config, data, num_workers=workers.num_workers, num_threads=workers.num_threads)
    folder = _open_folder(training, data)
    return FinetuneRun(training=training, data=data, workers=workers, folder=folder)


def open_training_data(config: FinetuneConfig) -> TrainingData:
    """Open the samples to train and to evaluate on.

    Raises:
        ValueError: an option does not fit the dataset, or there are no answers to learn from.
    """
    train = _conversations(
        open_questions(config, config.dataset_split, config.sample_slices), config.max_turns
    )
    if not config.evaluates:
        return TrainingData(train=train)
    with _naming(dataset_split="eval_split", sample_slices="eval_slices"):
        questions = open_questions(
            config, config.eval_split or config.dataset_split, config.eval_slices or "[:]"
        )
    return TrainingData(train=train, evaluation=_conversations(questions, max_turns=1))


def _conversations(questions: Questions, max_turns: int) -> Conversations:
    source, spec, selected = questions.source, questions.spec, questions.selected
    check_answers(source, spec, questions.split, selected)
    return Conversations(
        source=source,
        spec=spec,
        split=questions.split,
        system_prompt=questions.system_prompt,
        turns=group_turns(source, spec, selected, max_turns),
    )


@contextlib.contextmanager
def _naming(**names: str) -> Iterator[None]:
    """Call options in errors by the names that they have here."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        for name, here in names.items():
            message = message.replace(f"--{name}", f"--{here}")
        raise ValueError(message) from error


def _check_lora_targets(config: FinetuneConfig) -> None:
    """Look for the adapter's targets in the model's architecture, before any worker loads its weights."""
    model_id = resolve_model_id(config.model_id)
    skeleton = lora.build_skeleton(model_id, trust_remote_code=config.trust_remote_code)
    lora.find_lora_targets(skeleton, lora_config_of(config))


def _open_folder(training: TrainingRun, data: TrainingData) -> OutputDirectory:
    """Open the output folder for a new run, or for the one it holds if that is to be resumed.

    Raises:
        ValueError: it holds another run, or none to resume.
    """
    config = training.config
    folder = OutputDirectory.create(config.output_dir)
    options = {
        "job": "finetune",
        **{name: getattr(config, name) for name in _STEP_OPTIONS},
        "model_fingerprint": checks.fingerprint(config.model_id),
        "samples_per_step": training.samples_per_step,
        **dataclasses.asdict(data.train.spec),
    }
    found = folder.read_options()
    results = [name for name in (CHECKPOINTS, ADAPTER, MODEL, MERGED) if folder.has(name)]
    if (found is None and results) or (found is not None and found.get("job") != options["job"]):
        raise ValueError(
            f"--output_dir {config.output_dir} holds what no fine-tuning run left; choose another folder"
        )
    if config.resume:
        if found is None:
            raise ValueError(
                f"--output_dir {config.output_dir} holds no run to go on with; leave out --resume"
            )
        if results:  # a run that ended before its first checkpoint binds nobody to its options
            folder.check_options(options)
    elif results and not config.overwrite:
        raise ValueError(
            f"--output_dir {config.output_dir} holds an earlier run; pass --resume to go on with it, "
            "--overwrite to delete it, or choose another folder"
        )
    else:
        for name in results:
            folder.delete_folder(name)
    folder.reopen()
    folder.write_options(options)
    return folder


def run_finetune(run: FinetuneRun) -> TrainingReport:
    """Train, write the artifacts, check them, and write report and manifest.

    Raises:
        ValueError: the model cannot be trained this way, which only the workers could tell.
        FinetuneError: workers kept failing, or more samples failed than `--max_errors` allows.
    """
    started = time.perf_counter()
    outcome, result = fit(run)
    if outcome.too_many_errors is not None:
        raise FinetuneError(
            f"{outcome.too_many_errors} samples failed, --max_errors allows {run.config.max_errors}"
        )
    checks = _write_artifacts(run, outcome, _checkpoint_to_keep(run, result))
    report = _report(run, outcome, checks, time.perf_counter() - started)
    run.folder.finish(training_record(run.training, outcome, checks), render_training_html(report))
    return report


def fit(run: FinetuneRun) -> tuple[Outcome, Result]:
    """Run the trainer in a thread, and show how far it is in this one.

    Raises:
        ValueError: the model cannot be trained this way, which only the workers could tell.
        FinetuneError: workers kept failing.
    """
    board = Board.start()
    trainer = _make_trainer(run, board)
    ended: list[Any] = []

    def fit() -> None:
        try:
            ended.append(trainer.fit())
        except BaseException as error:  # raised below, in the thread that can show it
            ended.append(error)

    # In the main thread Ray would take over Ctrl-C.
    threading.Thread(target=fit, daemon=True, name="ray-train").start()
    with ProgressBar(run.training.num_steps, run.training.samples_per_step) as bar:
        while not ended:
            time.sleep(_POLL_S)
            bar.show(ray.get(board.read.remote()))
    if isinstance(ended[0], BaseException):
        raise FinetuneError(cluster.root_cause(ended[0])) from ended[0]
    returned = ended[0].return_value
    if "mistake" in returned:
        raise ValueError(returned["mistake"])
    return Outcome(**returned), ended[0]


def _make_trainer(run: FinetuneRun, board: Any) -> TorchTrainer:
    config, training = run.config, run.training
    shards = {TRAIN: Shard.of(run.data.train)}
    if run.data.evaluation is not None:
        shards[EVALUATION] = Shard.of(run.data.evaluation)
    return TorchTrainer(
        _train_on_ray,  # type: ignore[arg-type]  # what it returns becomes the result's return_value
        train_loop_config={"run": training, "board": board, "shards": shards},
        scaling_config=ScalingConfig(
            num_workers=run.workers.num_workers,
            use_gpu="GPU" in run.workers.resources,
            resources_per_worker=run.workers.resources,
        ),
        run_config=RunConfig(  # type: ignore[arg-type]
            **_storage(run.folder),
            name=CHECKPOINTS,
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.save_total_limit,
                checkpoint_score_attribute=training.eval_metric if config.load_best_model_at_end else None,
                checkpoint_score_order="max" if training.greater_is_better else "min",
            ),
            callbacks=[TellFailures(board)],
            logging_config=LoggingConfig("DEBUG" if config.log_level == "DEBUG" else "CRITICAL"),
        ),
    )


def _storage(folder: OutputDirectory) -> dict[str, Any]:
    """Return where Ray Train keeps checkpoints; a URI is opened here, since it may say how to."""
    if folder.is_local:
        return {"storage_path": folder.uri}
    filesystem, path = open_filesystem(folder.uri)
    return {"storage_path": path, "storage_filesystem": filesystem}


def _train_on_ray(config: dict[Any, Any]) -> dict[str, Any]:
    """Train as a worker of Ray Train; return the outcome as plain values.

    They pass through Ray's controller, which for anything else would import all of torch.
    """
    try:
        outcome = train_loop_per_worker(config, RayWorker(config["run"], config["shards"], config["board"]))
    except TrainingMistake as mistake:
        return {"mistake": str(mistake)}  # raised, it would be tried again and again
    return dataclasses.asdict(outcome)


class RayWorker:
    """A worker of Ray Train: samples come from shards, checkpoints go to the run's storage."""

    def __init__(self, run: TrainingRun, shards: Mapping[str, Shard], board: Any) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self._run = run
        self._shards = shards
        self._board = board

    def read(self, name: str, start: int, stop: int) -> Iterator[Features]:
        return self._shards[name].read(self._run.plan(name, self.world_size), self.rank, start, stop)

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        last = ray.train.get_checkpoint()
        if last is None:
            yield None
        else:
            with last.as_directory() as folder:
                yield Path(folder)

    def save(self, metrics: Mapping[str, float], folder: Path) -> None:
        ray.train.report(dict(metrics), checkpoint=ray.train.Checkpoint.from_directory(folder))
        shutil.rmtree(folder)

    def tell(self, **progress: Any) -> None:
        if self.rank == 0:
            self._board.tell.remote(progress)


def _checkpoint_to_keep(run: FinetuneRun, result: Result) -> ray.train.Checkpoint:
    """Return the last checkpoint, or the best one where that was asked for."""
    checkpoint = result.checkpoint
    if run.config.load_best_model_at_end:
        mode = "max" if run.training.greater_is_better else "min"
        checkpoint = result.get_best_checkpoint(run.training.eval_metric, mode)
    assert checkpoint is not None
    return checkpoint


def _write_artifacts(
    run: FinetuneRun, outcome: Outcome, checkpoint: ray.train.Checkpoint
) -> tuple[Check, ...]:
    """Write and check the artifacts in a process that has what a training worker had."""
    task = ray.remote(_write_artifacts_here).options(
        num_cpus=run.workers.resources.get("CPU", 0), num_gpus=run.workers.resources.get("GPU", 0)
    )
    try:
        return ray.get(task.remote(run.training, outcome, checkpoint, run.folder))
    except ray.exceptions.RayError as error:
        raise FinetuneError(f"the adapter could not be written: {cluster.root_cause(error)}") from error


def _write_artifacts_here(
    run: TrainingRun, outcome: Outcome, checkpoint: ray.train.Checkpoint, folder: OutputDirectory
) -> tuple[Check, ...]:
    with checkpoint.as_directory() as local:
        return write_artifacts(run, outcome, Path(local), folder)


def _report(run: FinetuneRun, outcome: Outcome, checks: Sequence[Check], elapsed_s: float) -> TrainingReport:
    config, training = run.config, run.training
    failed = {**outcome.eval_errors, **outcome.errors}
    num_seen = min(training.num_samples, outcome.num_steps * training.samples_per_step)
    method = "LoRA" if config.use_peft else "Full fine-tuning"
    return TrainingReport(
        title=f"{method} on {config.model_id}, {config.dataset_name} {config.dataset_split}",
        history=outcome.history,
        metric=training.metric if training.num_eval_samples and config.eval_samples else None,
        num_steps=outcome.num_steps,
        num_samples=num_seen - len(outcome.errors),
        num_failed=len(outcome.errors),
        samples_per_s=outcome.num_trained_here / outcome.training_s if outcome.num_trained_here else None,
        elapsed_s=elapsed_s,
        num_trainable=outcome.num_trainable,
        num_parameters=outcome.num_parameters,
        num_targets=len(outcome.targets) if config.use_peft else None,
        checks=tuple(checks),
        errors=group_errors({"sample_id": name, "error": failed[name]} for name in sorted(failed)),
        options=dataclasses.asdict(config),
        gallery=tuple(_gallery(run.data.evaluation, outcome.answered[:_GALLERY_SIZE])),
    )


def _gallery(evaluation: Conversations | None, answered: Sequence[dict[str, Any]]) -> Iterator[GalleryItem]:
    """Show answered evaluation samples with their images, read again from the source."""
    for row in answered:
        assert evaluation is not None
        index = int(row["sample_id"].rpartition("-")[2])
        (sample,) = dataclasses.replace(evaluation, turns=[(index,)]).read([0])
        yield GalleryItem.from_row(row, sample.get("image"))
