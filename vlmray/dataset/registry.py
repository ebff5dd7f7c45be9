"""Datasets: which columns mean what, which rows are asked for, and a row as a `Sample`.

    column names -> get_dataset_columns -> DatasetSpec;   row -> to_sample -> Sample

Rows have an index in their split that never changes; sample ids are made of it, and resuming relies
on it. Where rows come from is the business of `vlmray.dataset.sources`.

To add a dataset, register its columns: `register_dataset("owner/name", DatasetSpec(...))`.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmray.schema import Sample

SHORT_ANSWER = "{question}\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "{question}\n{choices}\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """Which columns mean what, how its questions are asked and scored."""

    question_column: str
    image_column: str | None = None
    answer_column: str | None = None
    family_column: str | None = None
    choices_column: str | None = None

    image_optional: bool = False
    """Some questions come without an image; elsewhere a missing image is a failed row."""

    family_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Names to show instead of the values of the family column."""

    prompt_template: str = "{question}"
    metric: str = "exact_match"

    def columns(self) -> dict[str, str]:
        """Return the columns in use, by the option that names each."""
        named = {name: getattr(self, name) for name in _COLUMN_OPTIONS}
        return {name: column for name, column in named.items() if column is not None}


_COLUMN_OPTIONS = ("image_column", "question_column", "answer_column", "family_column", "choices_column")

_VQA = DatasetSpec(
    question_column="question",
    image_column="image",
    answer_column="answer",
    prompt_template=SHORT_ANSWER,
)
_CHARTQA = dataclasses.replace(
    _VQA,
    question_column="query",
    answer_column="label",
    metric="relaxed_accuracy",
    family_column="human_or_machine",
    family_names={"machine": "augmented", "0": "human", "1": "augmented"},
)
_DOCVQA = dataclasses.replace(_VQA, answer_column="answers", metric="anls")
_MULTIPLE_CHOICE = dataclasses.replace(_VQA, prompt_template=LETTER_ANSWER, metric="choice_accuracy")

DATASETS: dict[str, DatasetSpec] = {
    "HuggingFaceM4/ChartQA": _CHARTQA,
    "lmms-lab/ChartQA": dataclasses.replace(
        _CHARTQA,
        question_column="question",
        answer_column="answer",
        family_column="type",
        family_names={"human_test": "human", "augmented_test": "augmented"},
    ),
    "lmms-lab/DocVQA": dataclasses.replace(_DOCVQA, family_column="question_types"),
    "lmms-lab/DocVQA#InfographicVQA": dataclasses.replace(_DOCVQA, family_column="answer_type"),
    "lmms-lab/textvqa": dataclasses.replace(_VQA, answer_column="answers", metric="vqa_accuracy"),
    "lmms-lab/ai2d": dataclasses.replace(_MULTIPLE_CHOICE, choices_column="options"),
    "derek-thomas/ScienceQA": dataclasses.replace(
        _MULTIPLE_CHOICE, choices_column="choices", family_column="subject", image_optional=True
    ),
    "xai-org/RealworldQA": dataclasses.replace(_VQA, prompt_template="{question}"),
    "charts": dataclasses.replace(
        _VQA, answer_column="answers", family_column="family", prompt_template="{question}"
    ),
}
"""Registered datasets by name on the hub; `name#config` where a configuration differs from the rest."""

# What people call these columns, tried in this order for a dataset that nobody registered.
_USUAL_COLUMNS = {
    "question_column": ("question", "query", "problem", "prompt", "text"),
    "image_column": ("image", "image_path", "image_url", "img", "picture", "images"),
    "answer_column": ("answers", "answer", "label", "solution", "response"),
}


def register_dataset(name: str, spec: DatasetSpec) -> None:
    """Add a dataset to the registry, or replace one; `name#config` names one configuration of it."""
    DATASETS[name] = spec


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
            raise ValueError(
                f"--{option}: {dataset_name} has no column {column!r}; it has {', '.join(column_names)}"
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
        raise ValueError(
            f"--question_column is needed: none of the columns {', '.join(column_names)} looks like one"
        )
    return DatasetSpec(
        question_column=question,
        image_column=columns["image_column"],
        answer_column=columns["answer_column"],
    )


_SLICE = re.compile(
    r"""
    \s* (?P<open>\[)? \s*
    (?: (?P<index>-?\d{1,18})
      | (?P<start>-?\d{1,18})? \s* : \s* (?P<stop>-?\d{1,18})? \s* (?: : \s* (?P<step>-?\d{1,18})? )?
    )
    \s* (?(open)\]) \s*
    """,
    re.ASCII | re.VERBOSE,
)


def parse_sample_slices(text: str, num_rows: int) -> list[int]:
    """Turn `--sample_slices` into row indices, in the order written, each once.

    Args:
        text: Python slices or indices, with or without brackets, separated by commas.
        num_rows: Rows of the split; negative indices count from its end.

    Raises:
        ValueError: a part is not a slice, an index is out of range, or nothing is selected.

    >>> parse_sample_slices("[0:3]", 10)
    [0, 1, 2]
    >>> parse_sample_slices("[-2:],[7:1:-3],5", 10)
    [8, 9, 7, 4, 5]
    """
    selected: dict[int, None] = {}
    for part in text.split(","):
        match = _SLICE.fullmatch(part)
        if match is None or (match["step"] and int(match["step"]) == 0):
            raise ValueError(_malformed(text))
        if match["index"]:
            index = int(match["index"])
            if not -num_rows <= index < num_rows:
                raise ValueError(f"--sample_slices {text!r}: no row {index}; the split has {num_rows} rows")
            selected[index % num_rows] = None
        else:
            bounds = slice(*(int(bound) if bound else None for bound in match.group("start", "stop", "step")))
            selected.update(dict.fromkeys(range(*bounds.indices(num_rows))))
    if not selected:
        raise ValueError(f"--sample_slices {text!r} selects nothing; the split has {num_rows} rows")
    return list(selected)


def _malformed(text: str) -> str:
    return (
        f"--sample_slices {text!r} is not a list of Python slices; "
        "examples: '[0:100]', '[:]', '[-5:]', '[::10]', '[7]', '[:10],[50:60]'"
    )


def sample_id(split: str, index: int) -> str:
    """Name a row for good: `test-000042`."""
    return f"{split}-{index:06d}"


def to_sample(row: Mapping[str, Any], spec: DatasetSpec, sample_id: str) -> Sample:
    """Read one row in the dataset's terms as a `Sample` in ours.

    An empty question or a broken image is not judged here: it becomes an error record later.

    Raises:
        ValueError: the row holds several images, or none although its dataset is about images.
    """
    choices = _texts(row[spec.choices_column]) if spec.choices_column else ()
    answers = _texts(row[spec.answer_column]) if spec.answer_column else ()
    if choices:
        answers = tuple(name for answer in answers for name in _as_choice(answer, choices))
    family = row[spec.family_column] if spec.family_column else None
    if isinstance(family, list):
        family = ", ".join(map(str, family))
    question = row[spec.question_column]
    image = _image(row[spec.image_column]) if spec.image_column else None
    if spec.image_column and image is None and not spec.image_optional:
        raise ValueError(f"no image in column {spec.image_column!r}")
    return Sample(
        sample_id=sample_id,
        question="" if question is None else str(question),
        answers=answers,
        image=image,
        choices=choices,
        family=None if family is None else spec.family_names.get(str(family), str(family)),
    )


def _texts(value: Any) -> tuple[str, ...]:
    """Flatten the shapes in which datasets keep answers: a value, a list, a list of {"answer": ...}."""
    if value is None:
        return ()
    if isinstance(value, Mapping):
        return _texts(value.get("answer", value.get("text")))
    if hasattr(value, "tolist"):  # a NumPy array or number
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tuple(text for item in value for text in _texts(item))
    return (str(value),)


def _as_choice(answer: str, choices: Sequence[str]) -> tuple[str, ...]:
    """Turn the index of a choice into its letter; before the text of a choice, put its letter."""
    letters = string.ascii_uppercase[: len(choices)]
    if answer in tuple(letters):
        return (answer,)
    if answer.isdecimal() and int(answer) < len(letters):
        return (letters[int(answer)],)
    return next(
        ((letter, answer) for letter, text in zip(letters, choices, strict=False) if text == answer),
        (answer,),
    )


def _image(value: Any) -> bytes | str | None:
    if isinstance(value, list):
        if len(value) > 1:
            raise ValueError(f"the row has {len(value)} images; one a question is supported")
        value = value[0] if value else None
    if isinstance(value, Mapping):
        # Empty bytes are a broken image, not a missing one: only None falls through to the path.
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    return value
