"""A run before it starts: every mistake is found here, nothing is loaded."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from vlmray import cluster
from vlmray.config import FinetuneConfig, options_that_affect
from vlmray.dataset.images import stamp_images
from vlmray.dataset.selection import Selection, describe_columns, open_selection, refuse_requests
from vlmray.errors import OptionError, RunError
from vlmray.finetune.results import ADAPTER, MERGED, MODEL
from vlmray.models import lora
from vlmray.models.families.base import Family
from vlmray.models.source import ModelSource
from vlmray.models.templates.chat import check_template, with_template
from vlmray.publishing.hub import HubRepo
from vlmray.storage.filesystem import check_apart
from vlmray.storage.fingerprints import digest
from vlmray.storage.run_folder import RunFolder
from vlmray.training.arguments import check_sft_options
from vlmray.training.run import TrainingData, TrainingRun
from vlmray.training.samples import Conversations, check_answers, group_turns
from vlmray.training.worker import lora_config_of

CHECKPOINTS = "checkpoints"

logger = logging.getLogger(__name__)


class FinetuneError(RunError):
    """A run that could not go on; its checkpoints are in the output folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneRun:
    """A run that is about to start."""

    training: TrainingRun
    data: TrainingData
    workers: cluster.WorkerPlan
    folder: RunFolder

    repos: Mapping[str, HubRepo] = field(default_factory=dict)
    """Where adapter, model and merged model are pushed to; empty where they are not."""

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
    check_apart(config.output_dir, config.dataset_name, config.model_id)
    model = ModelSource.open(config.model_id)
    check_sft_options(config)
    check_template(config, model.folder)
    config = settle_batches(config, model.family)
    data = open_training_data(config)
    if config.use_peft:
        _check_lora_targets(config, model)
    repos = _claim_repos(config)
    cluster.connect(config.log_level)
    workers = cluster.plan_workers(config.worker_range())
    if config.fsdp and workers.num_workers == 1:
        raise OptionError("fsdp", "shards over several workers, and there is one", "leave it out")
    training = TrainingRun.of(
        dataclasses.replace(with_template(config), model_id=model.address),
        data,
        num_workers=workers.num_workers,
        num_threads=workers.num_threads,
    )
    folder = _open_folder(training, data, model)
    logger.info("%s: %s", config.dataset_name, describe_columns(data.train.source, data.train.spec))
    return FinetuneRun(training=training, data=data, workers=workers, folder=folder, repos=repos)


def _claim_repos(config: FinetuneConfig) -> dict[str, HubRepo]:
    """Make the repositories of what a run will leave; none where it is not pushed."""
    suffixes = {ADAPTER if config.use_peft else MODEL: ""}
    suffixes |= {MERGED: f"-{MERGED}"} if config.merge_adapter else {}
    return {
        kind: repo
        for kind, suffix in suffixes.items()
        if (repo := HubRepo.of(config, "model", suffix, dry_run=config.dry_run))
    }


def settle_batches(config: FinetuneConfig, family: Family | None) -> FinetuneConfig:
    """Let rows of a model that is not among the tested ones through it one by one, in steps of as many.

    How the tensors of their images are padded is not known, and without that those of unlike images may not
    fit into one batch. The loss of a step is a mean over its tokens, however it is cut.
    """
    size = config.per_device_train_batch_size
    if family is None or family.is_tested or size == config.per_device_eval_batch_size == 1:
        return config
    logger.info(
        "the model is not among the tested families (docs/families.md): rows go through it one by one, in "
        "steps of as many"
    )
    return dataclasses.replace(
        config, per_device_train_batch_size=1, per_device_eval_batch_size=1,
        gradient_accumulation_steps=size * config.gradient_accumulation_steps,
    )  # fmt: skip


def open_training_data(config: FinetuneConfig) -> TrainingData:
    """Open the samples to train and to evaluate on.

    Raises:
        ValueError: an option does not fit the dataset, or there are no answers to learn from.
    """
    train = _conversations(
        open_selection(config, config.dataset_split, config.sample_slices), config.max_turns
    )
    if not config.evaluates:
        return TrainingData(train=train)
    questions = open_selection(
        config,
        config.eval_split or config.dataset_split,
        config.eval_slices or "[:]",
        split_option="eval_split",
        slices_option="eval_slices",
    )
    return TrainingData(train=train, evaluation=_conversations(questions, max_turns=1))


def _conversations(questions: Selection, max_turns: int) -> Conversations:
    source, spec, selected = questions.source, questions.spec, questions.selected
    refuse_requests(spec)
    if spec.form and max_turns > 1:
        raise OptionError("max_turns", f"is for questions, and {spec.question_column!r} holds conversations")
    check_answers(source, spec, questions.split, selected)
    return Conversations(
        source=source,
        spec=spec,
        split=questions.split,
        system_prompt=questions.system_prompt,
        turns=group_turns(source, spec, selected, max_turns),
    )


def _check_lora_targets(config: FinetuneConfig, model: ModelSource) -> None:
    """Look for the adapter's targets in the model's architecture, before any worker loads its weights."""
    skeleton = lora.build_skeleton(model.path, trust_remote_code=config.trust_remote_code)
    lora.find_lora_targets(skeleton, lora_config_of(config, skeleton))


def _fingerprint_images(samples: Conversations) -> str | None:
    """Return what changes when image files do that samples name by path; None where they name none."""
    rows = [row for turns in samples.turns for row in turns] if samples.source.base_dir else []
    stamps = stamp_images(samples.source, samples.spec, rows)
    return digest(sorted(stamps.items())) if stamps else None


class _TrainingFolder(RunFolder):
    """The folder of a fine-tuning run: checkpoints, and what was made of one."""

    def written(self) -> list[str]:
        return [name for name in (CHECKPOINTS, ADAPTER, MODEL, MERGED) if self.has(name)]


def _open_folder(training: TrainingRun, data: TrainingData, model: ModelSource) -> RunFolder:
    """Open the output folder for a new run, or for the one it holds if that is to be resumed.

    Raises:
        ValueError: it holds another run, or none to resume.
    """
    config = training.config
    folder = _TrainingFolder.open(
        config.output_dir,
        {
            "job": "finetune",
            **options_that_affect(config, "result"),
            "model_id": model.name,
            **model.fingerprints,
            "dataset_fingerprint": data.train.source.fingerprint(),
            "images_fingerprint": _fingerprint_images(data.train),
            "samples_per_step": training.samples_per_step,
            **dataclasses.asdict(data.train.spec),
        },
        earlier="require" if config.resume else "delete" if config.overwrite else "refuse",
        dry_run=config.dry_run,
    )
    folder.reopen()
    return folder
