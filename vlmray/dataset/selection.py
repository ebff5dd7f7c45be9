"""Open what a config asks about: the rows of a split, and what its columns mean."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vlmray.config import QuestionsConfig
from vlmray.dataset.benchmarks import chartqapro, gqa
from vlmray.dataset.chat.conversations import is_conversation
from vlmray.dataset.chat.marks import find_mark
from vlmray.dataset.columns import NO_COLUMN, check_choices, check_questions, get_dataset_columns
from vlmray.dataset.prompts import check_prompt_template
from vlmray.dataset.registry import DatasetSpec, split_columns
from vlmray.dataset.slices import parse_sample_slices
from vlmray.dataset.sources import Source, open_source
from vlmray.dataset.text.values import printable
from vlmray.errors import OptionError, mistake_in
from vlmray.metrics import METRICS

_NUM_FIRST_ROWS = 8
"""Rows that are looked at for what column names do not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Rows of one split that were asked for."""

    source: Source
    spec: DatasetSpec
    split: str
    selected: Sequence[int]
    """Row indices, in the order asked for."""

    system_prompt: str | None = None


def describe_columns(source: Source, spec: DatasetSpec) -> str:
    """Say in one line which columns are taken for what, and how many rows have an image."""
    columns = {option.removesuffix("_column"): name for option, name in spec.columns().items()}
    if spec.form:
        columns = {spec.form if what == "question" else what: name for what, name in columns.items()}
    taken = ", ".join(f"{what} from {name!r}" for what, name in columns.items())
    used = {
        *columns.values(),
        *split_columns(columns.get("choices", "")),
        *spec.image_columns,
        spec.metric_column,
    }
    unused = [name for name in source.column_names if name not in used]
    parts = [taken, f"metric {spec.metric}", _count_images(source, spec)]
    if spec.image_column and any(map(find_mark, _first_questions(source, spec))):
        parts.append(
            "an image stands where a question has <image>, and first where that is before or after it"
        )
    if unused:
        parts.append(f"not used: {', '.join(unused)}")
    return "; ".join(parts)


def _count_images(source: Source, spec: DatasetSpec) -> str:
    if spec.image_column is None:
        return "images where rows hold them" if spec.form else "no images"
    count = source.count_filled(spec.image_columns[0])
    return f"images in {'?' if count is None else f'{count:,}'} of the split's {len(source):,} rows"


def _first_questions(source: Source, spec: DatasetSpec) -> list[str]:
    rows = source.read(range(min(_NUM_FIRST_ROWS, len(source))), [spec.question_column])
    found = (row[spec.question_column] for row in rows)
    return [printable(question) for question in found if not is_conversation(question)]


def open_selection(
    config: QuestionsConfig,
    split: str,
    slices: str,
    *,
    split_option: str = "dataset_split",
    slices_option: str = "sample_slices",
    random_access: bool = False,
) -> Selection:
    """Open a split and check every option that is about the dataset.

    Args:
        config: Names the dataset and its columns.
        split: Split to open.
        slices: Rows to select.
        split_option: Option that the split was given by.
        slices_option: Option that the slices were given by.
        random_access: Rows will be read in any order.

    Raises:
        ValueError: an option does not fit the dataset.
    """
    if "[" in split or "/" in split:
        hint = f"rows are chosen by --{slices_option}"
        raise OptionError(split_option, f"{split!r} is not a split name", hint)
    with _calling(dataset_split=split_option, sample_slices=slices_option):
        source = _open_whole_rows(config, split, random_access)
        selected = parse_sample_slices(slices, len(source))
    some = selected[:_NUM_FIRST_ROWS]
    spec = get_dataset_columns(
        config.dataset_name,
        source.column_names,
        dataset_config=config.dataset_config,
        first_rows=lambda: source.read(some),
        image_column=config.image_column,
        question_column=config.question_column,
        answer_column=config.answer_column,
        family_column=config.family_column,
        choices_column=config.choices_column,
        system_column=config.system_column,
        prompt_template=config.prompt_template,
        metric=config.metric,
    )
    if spec.metric not in METRICS:
        raise OptionError("metric", f"{spec.metric!r} is unknown", f"known: {', '.join(METRICS)}")
    _check_prompt(config, spec, source)
    check_questions(
        spec, source.read(some, [spec.question_column]), without_images=config.image_column == NO_COLUMN
    )
    return Selection(
        source=source, spec=spec, split=split, selected=selected, system_prompt=config.system_prompt
    )


def reword(asked: Selection, config: QuestionsConfig) -> Selection:
    """Ask the same rows in the words of another config.

    Raises:
        ValueError: its prompt template does not fit the dataset.
    """
    spec, template = asked.spec, config.prompt_template
    if template is not None:
        spec = dataclasses.replace(spec, prompt_template=template, open_prompt_template=None)
        _check_prompt(config, spec, asked.source)
    return dataclasses.replace(asked, spec=spec, system_prompt=config.system_prompt)


def _check_prompt(config: QuestionsConfig, spec: DatasetSpec, source: Source) -> None:
    if spec.form and (config.prompt_template or config.choices_column):
        option = "prompt_template" if config.prompt_template else "choices_column"
        raise OptionError(option, f"is for questions, and {spec.question_column!r} holds {spec.form}s")
    with mistake_in("prompt_template"):
        check_prompt_template(spec.prompt_template)
    check_choices(spec, source.column_names)


def _open_whole_rows(config: QuestionsConfig, split: str, random_access: bool) -> Source:
    """Open a split; of a benchmark that keeps its rows in pieces, with these put together."""
    name, part = config.dataset_name, config.dataset_config
    source = open_source(name, split, part, random_access=random_access)
    columns = {*source.column_names}
    if columns >= chartqapro.COLUMNS:
        return chartqapro.ChartQAPro(source)
    images = gqa.images_beside(part)
    if images and columns >= gqa.COLUMNS and "image" not in columns:
        return gqa.GQA(source, open_source(name, split, images, random_access=random_access))
    return source


def refuse_requests(spec: DatasetSpec) -> None:
    """Refuse a batch file of requests where there have to be questions.

    Raises:
        OptionError: It is one.
    """
    if spec.form == "request":
        raise OptionError("dataset_name", "holds batch requests, which vlmray infer answers")


@contextlib.contextmanager
def _calling(**names: str) -> Iterator[None]:
    """Give mistakes the names that the options with the mistakes have here."""
    try:
        yield
    except OptionError as error:
        if names.get(error.option, error.option) == error.option:
            raise
        raise OptionError(names[error.option], error.problem, error.hint) from error
