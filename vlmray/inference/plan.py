"""A run before it starts: every mistake is found here, nothing is loaded."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from vlmray.config import BenchmarkConfig, InferConfig, options_that_affect, sampling_of
from vlmray.dataset.images import stamp_images
from vlmray.dataset.registry import DatasetSpec
from vlmray.dataset.rows import group_by_image, read_images
from vlmray.dataset.selection import Selection, describe_columns, open_selection
from vlmray.dataset.slices import mask_rows, pack_rows, row_indices, sample_id, unpack_rows
from vlmray.dataset.sources import Source
from vlmray.engines import check_engine
from vlmray.engines.auto import EngineChoice, choose_engine
from vlmray.engines.fake import FakeEngine
from vlmray.engines.forms import read_form
from vlmray.errors import OptionError, RunError
from vlmray.inference.result_folder import ABSENT, ANSWERED, FAILED, ResultFolder
from vlmray.inference.reuse.folder import AnswerFolder, open_cache
from vlmray.inference.stages import ADAPTER, Task
from vlmray.models.source import ModelSource
from vlmray.models.templates.chat import check_template, template_fingerprint, with_template
from vlmray.publishing.hub import HubRepo
from vlmray.publishing.trackers import check_tracker
from vlmray.reports.bar import open_bar
from vlmray.schema import Row
from vlmray.storage.filesystem import check_apart

logger = logging.getLogger(__name__)


class InferenceError(RunError):
    """A run that could not go on; everything finished is in the output folder."""


def plan_inference(
    config: InferConfig, *, questions: Selection | None = None, choice: EngineChoice | None = None
) -> InferenceRun:
    """Open dataset and output folder, find what is left to do, and check all options against them.

    Args:
        config: The run's options.
        questions: What the options ask about, where it is open already.
        choice: Of the engine, where it is made already.

    Raises:
        ValueError: an option does not fit the dataset, the model or the output folder.
        FileNotFoundError: the model or adapter is not there.
    """
    check_tracker(config.report_to)
    check_apart(config.output_dir, config.dataset_name, config.model_id, config.adapter)
    choice = choice or choose_engine_of(config, [(config.model_id, config.adapter)], [config.output_dir])
    config = choice.settle(config)
    model = _open_model(config)
    check_engine(config, config.model_id, [config.adapter] if config.adapter else [])
    cache = open_cache(config)
    is_first = questions is None
    questions = questions or open_selection(config, config.dataset_split, config.sample_slices)
    source, spec, selected = questions.source, questions.spec, questions.selected
    _check_rows(config, spec)
    task = _task(config, spec)
    folder = ResultFolder.open_for(
        len(selected),
        config.output_dir,
        {
            **options_that_affect(config, "result"),
            **model.fingerprints,
            **template_fingerprint(config),
            "response_schema": task.form and task.form.schema,
            "num_samples": task.num_samples if task.num_samples > 1 else None,
            **dataclasses.asdict(spec),
            "dataset_fingerprint": source.fingerprint(),
        },
        earlier="delete" if config.overwrite else "resume",
        output_format=config.output_format,
        dry_run=config.dry_run,
    )
    if config.output_format == "auto" and folder.output_format == "parquet":
        logger.info(
            "%s rows are written as Parquet alone; --output_format both adds files of each",
            f"{len(selected):,}",
        )
    pending = _find_pending(folder, source, spec, config.dataset_split, selected, is_new=config.overwrite)
    if config.engine != "fake":  # which has no use for images in common
        pending = group_by_image(source, spec, pending)
    if is_first:
        logger.info("%s: %s", config.dataset_name, describe_columns(source, spec))
    return InferenceRun(
        config=config, choice=choice, model=model, source=source, spec=spec, task=task, folder=folder,
        selected=selected, pending=pending, repo=HubRepo.of(config, "dataset", dry_run=config.dry_run),
        cache=cache,
    )  # fmt: skip


def _check_rows(config: InferConfig, spec: DatasetSpec) -> None:
    """Refuse options that the rows of a dataset have no use for."""
    if config.target_accuracy is not None and not spec.has_answers:
        raise OptionError(
            "target_accuracy", f"is about scores, and {config.dataset_name} has no answers to compare with"
        )
    if config.num_samples > 1 and spec.form == "request":
        raise OptionError(
            "num_samples", "is not for rows that are requests, of which each gets one answer", "leave it out"
        )


def choose_engine_of(
    config: InferConfig | BenchmarkConfig,
    models: Sequence[tuple[str, str | None]],
    folders: Sequence[str],
) -> EngineChoice:
    """Choose the engine of runs that are compared, and say which.

    Args:
        config: What they have in common.
        models: Model and adapter of each.
        folders: Where the answers of each go.

    Raises:
        ValueError: An option is for an engine that is not installed, or a folder is another job's.
    """
    goes_on = config.engine == "auto" and not config.overwrite
    choice = choose_engine(
        config,
        [model_id for model_id, _ in models],
        [adapter for _, adapter in models if adapter],
        find_cluster_objection=lambda: _find_cluster_objection(config.log_level),
        begun_with=next(filter(None, map(_engine_before, folders)), None) if goes_on else None,
    )
    if choice.is_news:
        logger.info("%s", choice)
    return choice


def _find_cluster_objection(log_level: str) -> str | None:
    from vlmray import cluster  # with Ray, which is started only for this question

    return cluster.find_gpu_objection("vllm", log_level)


def _engine_before(output_dir: str) -> str | None:
    """Return the engine of the results that a folder holds."""
    folder = ResultFolder.find(output_dir, "infer")
    return (folder.read_options() or {}).get("engine") if folder.has_results() else None


def _find_pending(
    folder: ResultFolder,
    source: Source,
    spec: DatasetSpec,
    split: str,
    selected: Sequence[int],
    *,
    is_new: bool,
) -> Sequence[int]:
    """Find the rows that are not answered yet, and take what is left of them out of the folder."""
    stamps = stamp_images(source, spec, selected)
    replaced = folder.note_images({sample_id(split, index): stamp for index, stamp in stamps.items()})
    if replaced:
        logger.info("%d rows name images that were replaced since; they are asked again", len(replaced))
    states = folder.states(len(source))
    states[row_indices(pa.array(sorted(replaced), pa.string()))] = ABSENT
    if is_new or not (states == ANSWERED).any():
        pending = selected
    else:
        rows = unpack_rows(selected)
        pending = pack_rows(rows[states[rows] != ANSWERED])
    if pending:
        folder.reopen()
        folder.discard(mask_rows(pending, len(source)) & (states == FAILED))
    return pending


def _open_model(config: InferConfig) -> ModelSource:
    if config.engine == "fake":
        FakeEngine.parse_model_id(config.model_id)
    elif config.engine != "openai":
        model = ModelSource.open(config.model_id, config.adapter)
        check_template(config, model.folder)
        return model
    return ModelSource(name=config.model_id, path=config.model_id, adapter=config.adapter)  # only a name


def _task(config: InferConfig, spec: DatasetSpec) -> Task:
    return Task(
        prompt_template=spec.prompt_template,
        open_prompt_template=spec.open_prompt_template,
        system_prompt=config.system_prompt,
        metric=spec.metric,
        chat_template_kwargs=config.chat_template_kwargs or {},
        models=_names_of_models(config) if spec.form == "request" else {},
        form=read_form(config),
        num_logprobs=config.wanted_logprobs(asks_server=config.endpoint is not None),
        num_samples=config.num_samples,
        **sampling_of(config),
    )


def _names_of_models(config: InferConfig) -> dict[str, str | None]:
    """Return by what names requests may ask for the base, and for the adapter: whole ones or their ends."""
    names: dict[str, str | None] = {}
    for name, adapter in ((config.adapter, ADAPTER), (config.model_id, None)):
        if name:
            names |= {name: adapter, name.rstrip("/").rpartition("/")[2]: adapter}
    return names


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceRun:
    """A run before it starts: everything checked, nothing loaded."""

    config: InferConfig
    """The options, with the engine that was chosen."""

    choice: EngineChoice
    model: ModelSource
    source: Source
    spec: DatasetSpec
    task: Task
    folder: ResultFolder

    selected: Sequence[int]
    """Row indices of the selection."""

    pending: Sequence[int]
    """Row indices still to answer."""

    repo: HubRepo | None = None
    """Where the predictions are pushed to."""

    cache: AnswerFolder | None = None
    """Answers of earlier runs, to which those of this one are added."""

    @property
    def fetches_images(self) -> bool:
        """Whether images that are URLs are fetched here, and not by the server that answers."""
        return self.config.image_transport == "data"

    @property
    def worker_config(self) -> InferConfig:
        """The options, with model and adapter as workers find them."""
        model = self.model
        config = with_template(self.config)
        return dataclasses.replace(config, model_id=model.address, adapter=model.adapter_address)

    def open_bar(self, name: str | None = None, *, form: str | None = None) -> tqdm[Any]:
        """Show how far the run is, with what earlier ones did already on it."""
        done = len(self.selected) - len(self.pending)
        return open_bar(len(self.selected), done, "samples", name=name, form=form)

    def check_errors(self, num_failed: int) -> None:
        """Stop the run if more rows failed than it allows.

        Raises:
            InferenceError: They did.
        """
        limit = self.config.max_errors
        if limit is not None and num_failed > limit:
            raise InferenceError(f"{num_failed} rows failed, --max_errors allows {limit}")

    def read_images(self, row: Row) -> list[bytes]:
        """Read the images of a result: as they were written, or else from their source."""
        written = self.folder.read_images(row["sample_id"])
        return written or read_images(self.source, self.spec, self.config.dataset_split, row["row_index"])
