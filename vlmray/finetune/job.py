"""The fine-tuning job on Ray Train: plan a run, watch the workers train it, keep what comes out.

    config -> plan_finetune -> run_finetune: TorchTrainer -> last checkpoint -> adapter, checks, report
                                   |
                       shards -> train_loop_per_worker, one on each GPU -> checkpoints in the output folder

A worker or node that dies takes the run back to its last checkpoint, not to its start, and so does
`--resume` after the driver died.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import ray.train
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from vlmray import cluster
from vlmray.dataset.rows import read_images
from vlmray.dataset.slices import sample_id
from vlmray.dataset.sources import display_name
from vlmray.finetune.artifacts import training_record, write_artifacts
from vlmray.finetune.plan import CHECKPOINTS, FinetuneError, FinetuneRun
from vlmray.finetune.progress import Board, ProgressBar, Restarts
from vlmray.finetune.pushing import push_artifacts
from vlmray.finetune.ray_worker import Shard, train_on_ray
from vlmray.finetune.report import render_training_html
from vlmray.finetune.results import Check, TrainingReport
from vlmray.reports.bar import write_above_bar
from vlmray.reports.errors import group_errors
from vlmray.reports.gallery import GalleryItem
from vlmray.schema import Row
from vlmray.storage.filesystem import open_filesystem
from vlmray.storage.run_folder import RunFolder
from vlmray.training.run import EVALUATION, TRAIN, TrainingRun
from vlmray.training.samples import Conversations
from vlmray.training.worker import Outcome

_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
"""Seconds after which Ray Train looks anew at how many workers have a place, by default 60. What it looked at
before may have been from before a node was lost: its view of the cluster is up to 20 s old."""

_POLL_S = 0.2
_RESIZE_S = 30.0
"""How often to look whether machines have come that more workers could have: they cost a restart."""

_GALLERY_SIZE = 60


def run_finetune(run: FinetuneRun) -> TrainingReport:
    """Train, write the artifacts, check them, write report and manifest, and push what is to be pushed.

    Raises:
        ValueError: the model cannot be trained this way, which only the workers could tell, or diverged.
        FinetuneError: workers kept failing, or more samples failed than `--max_errors` allows.
        PushError: the hub did not take what is written.
    """
    started = time.perf_counter()
    outcome, result = fit(run)
    if outcome.too_many_errors is not None:
        raise FinetuneError(
            f"{outcome.too_many_errors} samples failed, --max_errors allows {run.config.max_errors}"
        )
    checks = _write_artifacts(run, outcome, _checkpoint_to_keep(run, result))
    report = _report(run, outcome, checks, time.perf_counter() - started)
    record = training_record(run.training, outcome, checks)
    run.folder.finish(record, render_training_html(report))
    push_artifacts(run, report, record, cast(list[Row], outcome.answered))
    return report


def describe(run: FinetuneRun) -> list[tuple[str, str]]:
    """Say what a run would do and where, without doing it; lines of a title and a text."""
    training = run.training
    evaluated = f", {training.num_eval_samples:,} to evaluate on" if training.num_eval_samples else ""
    return [
        ("samples", f"{training.num_samples:,} to train on{evaluated}"),
        ("steps", f"{training.num_steps:,} of {training.samples_per_step} samples"),
        *cluster.preview(run.workers.asked, run.workers.num_workers),
        ("outputs", run.folder.uri),
        *(("pushed to", repo.url) for repo in run.repos.values()),
    ]


def fit(run: FinetuneRun) -> tuple[Outcome, Result]:
    """Run the trainer in a thread, and show how far it is in this one.

    Raises:
        ValueError: the model cannot be trained this way, which only the workers could tell, or diverged.
        FinetuneError: workers kept failing.
    """
    cluster.tell_if_taken(cpus=run.workers.cpus_per_task)
    os.environ.setdefault(_START_TIMEOUT, "10")
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
        waiting = cluster.Waiting(run.workers.asked, run.config.wait_for_resources_s, say=write_above_bar)
        while not ended:
            time.sleep(_POLL_S)
            bar.show(ray.get(board.read.remote()))
            waiting.look()
    if isinstance(ended[0], BaseException):
        error = getattr(ended[0], "controller_failure", ended[0])
        raise FinetuneError(cluster.root_cause(error)) from ended[0]
    returned = ended[0].return_value
    if "mistake" in returned:
        raise ValueError(returned["mistake"])
    return Outcome(**returned), ended[0]


def _make_trainer(run: FinetuneRun, board: Any) -> TorchTrainer:
    config, training = run.config, run.training
    workers = run.workers
    shards = {TRAIN: Shard.of(run.data.train, workers.cpus_per_task)}
    if run.data.evaluation is not None:
        shards[EVALUATION] = Shard.of(run.data.evaluation, workers.cpus_per_task)
    is_fixed = workers.min_workers == workers.num_workers
    num_workers = workers.num_workers if is_fixed else (workers.min_workers, workers.num_workers)
    return TorchTrainer(
        train_on_ray,  # type: ignore[arg-type]  # what it returns becomes the result's return_value
        train_loop_config={"run": training, "board": board, "shards": shards},
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # as below
            num_workers=num_workers,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=_RESIZE_S,
            use_gpu="GPU" in workers.resources,
            resources_per_worker=workers.resources,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # type checkers see that of Ray Train's first version
            **_storage(run.folder),
            name=CHECKPOINTS,
            failure_config=FailureConfig(max_failures=-1),  # which cannot tell machines: see `Restarts`
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.save_total_limit,
                checkpoint_score_attribute=training.eval_metric if config.load_best_model_at_end else None,
                checkpoint_score_order="max" if training.greater_is_better else "min",
            ),
            callbacks=[Restarts(board, config.max_failures)],  # type: ignore[list-item]
            logging_config=LoggingConfig("DEBUG" if config.log_level == "DEBUG" else "CRITICAL"),
        ),
    )


def _storage(folder: RunFolder) -> dict[str, Any]:
    """Return where Ray Train keeps checkpoints; a URI is opened here, since it may say how to."""
    if folder.is_local:
        return {"storage_path": folder.uri}
    filesystem, path = open_filesystem(folder.uri)
    return {"storage_path": path, "storage_filesystem": filesystem}


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
    run: TrainingRun, outcome: Outcome, checkpoint: ray.train.Checkpoint, folder: RunFolder
) -> tuple[Check, ...]:
    with checkpoint.as_directory() as local:
        return write_artifacts(run, outcome, Path(local), folder)


def _report(run: FinetuneRun, outcome: Outcome, checks: Sequence[Check], elapsed_s: float) -> TrainingReport:
    config, training = run.config, run.training
    failed = {**outcome.eval_errors, **outcome.errors}
    num_seen = min(training.num_samples, outcome.num_steps * training.samples_per_step)
    method = "LoRA" if config.use_peft else "Full fine-tuning"
    dataset = display_name(config.dataset_name, config.dataset_config)
    return TrainingReport(
        title=f"{method} of {config.model_id} on {dataset}, {config.dataset_split} split",
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
        gallery=tuple(_gallery(run.data.evaluation, cast(list[Row], outcome.answered[:_GALLERY_SIZE]))),
    )


def _gallery(evaluation: Conversations | None, answered: Sequence[Row]) -> Iterator[GalleryItem]:
    """Show answered evaluation samples with their images, read again from the source."""
    if evaluation is None:
        return
    source, spec, split = evaluation.source, evaluation.spec, evaluation.split
    indices = {sample_id(split, index): index for sample in evaluation.turns for index in sample}
    for row in answered:
        yield GalleryItem.from_row(row, read_images(source, spec, split, indices[row["sample_id"]]))
