"""Open what a config asks about: the rows of a split, and what its columns mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmray.config import QuestionsConfig
from vlmray.dataset.prompts import check_prompt_template
from vlmray.dataset.registry import DatasetSpec, get_dataset_columns
from vlmray.dataset.slices import parse_sample_slices
from vlmray.dataset.sources import Source, open_source
from vlmray.metrics import METRICS


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Rows of one split that were asked for."""

    source: Source
    spec: DatasetSpec
    split: str
    selected: Sequence[int]
    """Row indices, in the order asked for."""

    system_prompt: str | None = None


def open_selection(
    config: QuestionsConfig, split: str, slices: str, *, random_access: bool = False
) -> Selection:
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
    return Selection(
        source=source, spec=spec, split=split, selected=selected, system_prompt=config.system_prompt
    )
