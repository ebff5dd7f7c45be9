"""Which columns of a dataset mean what: as registered, as usual, or as the options say.

column names -> get_dataset_columns -> DatasetSpec
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from vlmray.dataset.registry import DATASETS, DatasetSpec
from vlmray.errors import OptionError

# What people call these columns, tried in this order for a dataset that nobody registered.
_USUAL_COLUMNS = {
    "question_column": ("question", "query", "problem", "prompt", "text"),
    "image_column": ("image", "image_path", "image_url", "img", "picture", "images"),
    "answer_column": ("answers", "answer", "label", "solution", "response"),
}


def get_dataset_columns(
    dataset_name: str,
    column_names: Sequence[str],
    *,
    dataset_config: str | None = None,
    **overrides: str | None,
) -> DatasetSpec:
    """Decide which columns mean what.

    A registered name decides; else a registered dataset with exactly these columns (a copy of ChartQA
    in a local folder is ChartQA); else the usual column names. Options win over all of these.

    Args:
        dataset_name: Name on the hub, path, or `charts`.
        column_names: Columns the dataset has.
        dataset_config: Configuration of the dataset.
        **overrides: Fields of `DatasetSpec` that the user set; None where not.

    Raises:
        ValueError: a column is missing, or no question column could be told.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    spec = _registered(dataset_name, dataset_config, column_names) or _guess(column_names, given)
    spec = dataclasses.replace(spec, **given)  # type: ignore[arg-type]
    for option, column in spec.columns().items():
        if column not in column_names:
            raise OptionError(
                option, f": {dataset_name} has no column {column!r}", f"it has {', '.join(column_names)}"
            )
    return spec


def _registered(name: str, config: str | None, column_names: Sequence[str]) -> DatasetSpec | None:
    name = name.partition("?")[0]
    known = DATASETS.get(f"{name}#{config}") or DATASETS.get(name)
    if known:
        return known
    # A family column sets ChartQA apart from any other table with images, questions and answers.
    return next(
        (
            spec
            for spec in DATASETS.values()
            if spec.family_column and set(spec.columns().values()) <= set(column_names)
        ),
        None,
    )


def _guess(column_names: Sequence[str], given: Mapping[str, str]) -> DatasetSpec:
    columns = {
        option: next((name for name in usual if name in column_names), None)
        for option, usual in _USUAL_COLUMNS.items()
    }
    question = given.get("question_column") or columns["question_column"]
    if question is None:
        raise OptionError(
            "question_column", f"is needed: none of the columns {', '.join(column_names)} looks like one"
        )
    return DatasetSpec(
        question_column=question,
        image_column=columns["image_column"],
        answer_column=columns["answer_column"],
    )
