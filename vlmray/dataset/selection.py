"""Open what a config asks about: the rows of a split, and what its columns mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmray.builtin.random_models import is_built_in
from vlmray.config import QuestionsConfig
from vlmray.dataset.prompts import check_prompt_template
from vlmray.dataset.registry import DatasetSpec, get_dataset_columns, parse_sample_slices
from vlmray.dataset.sources import Source, open_source
from vlmray.metrics import METRICS
from vlmray.models import checks
from vlmray.storage import hub


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """Rows of one split that were asked for."""

    source: Source
    spec: DatasetSpec
    split: str
    selected: Sequence[int]
    """Row indices, in the order asked for."""

    system_prompt: str | None = None


def open_questions(
    config: QuestionsConfig, split: str, slices: str, *, random_access: bool = False
) -> Questions:
    """Open a split and check every option that is about the dataset.

    Args:
        config: Names the dataset and its columns.
        split: Split to open.
        slices: Rows to select.
        random_access: Rows will be read in any order.

    Raises:
        ValueError: an option does not fit the dataset.
    """
    source = open_source(config.dataset_name, split, config.dataset_config, random_access=random_access)
    spec = get_dataset_columns(
        config.dataset_name,
        source.column_names,
        dataset_config=config.dataset_config,
        image_column=config.image_column,
        question_column=config.question_column,
        answer_column=config.answer_column,
        family_column=config.family_column,
        prompt_template=config.prompt_template,
        metric=config.metric,
    )
    selected = parse_sample_slices(slices, len(source))
    if spec.metric not in METRICS:
        raise ValueError(f"--metric {spec.metric!r} is unknown; known: {', '.join(METRICS)}")
    try:
        check_prompt_template(spec.prompt_template)
    except ValueError as error:
        raise ValueError(f"--prompt_template: {error}") from error
    return Questions(
        source=source, spec=spec, split=split, selected=selected, system_prompt=config.system_prompt
    )


def check_model(model_id: str) -> None:
    """Check on the driver what a worker would only find after it started.

    Raises:
        ValueError: not a model, or the hub does not answer.
        FileNotFoundError: a folder that is not there or lacks weights.
    """
    if not is_built_in(model_id):
        checks.check_model_folder(model_id)
        if checks.local_folder(model_id) is None:
            hub.check_reachable(model_id, "model", option="--model_id")
