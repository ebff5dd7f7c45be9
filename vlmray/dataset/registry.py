"""Datasets by name: what their columns mean, how they are asked and scored.

To add a dataset, register its columns: `register_dataset("owner/name", DatasetSpec(...))`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

SHORT_ANSWER = "{question}\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "{question}\n{choices}\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """Which columns mean what, how its questions are asked and scored."""

    question_column: str
    image_column: str | None = None
    """One column, of an image or a list of them, or several, with commas between their names."""

    answer_column: str | None = None
    family_column: str | None = None
    choices_column: str | None = None
    """One column of lists, or several of one choice each, with commas between their names."""

    system_column: str | None = None
    """System prompts of rows that bring a conversation."""

    form: Literal["conversation", "request"] | None = None
    """What the question column holds, where it is more than a question."""

    image_optional: bool = False
    """Some questions come without an image; elsewhere a missing image is a failed row."""

    family_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Names to show instead of the values of the family column."""

    prompt_template: str = "{question}"

    open_prompt_template: str | None = None
    """That of rows without choices, where it is another."""

    metric: str = "exact_match"

    metric_column: str | None = None
    """Column whose values tell rows that are scored by metrics of their own."""

    row_metrics: Mapping[str, str] | None = None
    """These metrics, by such a value."""

    @property
    def image_columns(self) -> list[str]:
        """The columns that images are in."""
        return split_columns(self.image_column) if self.image_column else []

    def in_order_of_prompt(self, question: str, choices: Sequence[str]) -> list[str]:
        """Return the texts of a row as the prompt template has them."""
        choices_first = 0 <= self.prompt_template.find("{choices}") < self.prompt_template.find("{question}")
        return [*choices, question] if choices_first else [question, *choices]

    def template_of(self, choices: Sequence[str]) -> str:
        """Return the prompt template of a row with these choices."""
        return self.prompt_template if choices else self.open_prompt_template or self.prompt_template

    @property
    def may_lack_images(self) -> bool:
        """Whether a row without an image is none that failed."""
        return self.image_optional or self.image_column is None or self.form is not None

    @property
    def has_answers(self) -> bool:
        """Whether rows may say what is expected: in a column, or as a conversation's last turn."""
        return self.answer_column is not None or self.form == "conversation"

    def columns(self) -> dict[str, str]:
        """Return the columns in use, by the option that names each."""
        named = {name: getattr(self, name) for name in _COLUMN_OPTIONS}
        return {name: column for name, column in named.items() if column is not None}


_COLUMN_OPTIONS = (
    "image_column", "question_column", "answer_column", "family_column", "choices_column", "system_column",
)  # fmt: skip

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

_CHOICES_IN_QUESTION = "{question}\nAnswer with the option's letter from the given choices directly"

_REGISTERED: dict[str, DatasetSpec] = {
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
    "lmms-lab/VQAv2": dataclasses.replace(
        _VQA, answer_column="answers", family_column="answer_type", metric="vqav2_accuracy"
    ),
    "lmms-lab/GQA": dataclasses.replace(_VQA, metric="gqa_accuracy"),
    "lmms-lab/ChartQAPro": dataclasses.replace(
        _VQA,
        question_column="Question",
        answer_column="Answer",
        family_column="Question Type",
        prompt_template="{question}\nAnswer the question with a short phrase.",
        metric="chartqapro_accuracy",
        metric_column="Scoring",
        row_metrics={"exact": "chartqapro_exact"},
    ),
    "lmms-lab/POPE": dataclasses.replace(_VQA, family_column="category"),
    "Lin-Chen/MMStar": dataclasses.replace(
        _VQA, family_column="category", prompt_template=_CHOICES_IN_QUESTION, metric="mmstar_accuracy"
    ),
    "echo840/OCRBench": dataclasses.replace(
        _VQA,
        family_column="question_type",
        prompt_template="{question}",
        metric="ocrbench_accuracy",
        metric_column="dataset",
        row_metrics={"HME100k": "ocrbench_formula"},
    ),
    "lmms-lab/MMMU": dataclasses.replace(
        _VQA,
        image_column=",".join(f"image_{number}" for number in range(1, 8)),
        choices_column="options",
        family_column="subfield",
        prompt_template=LETTER_ANSWER.replace("{choices}\n", "{choices}\n\n"),
        open_prompt_template=SHORT_ANSWER.replace("{question}\n", "{question}\n\n"),
        metric="mmmu_choice",
        metric_column="question_type",
        row_metrics={"open": "mmmu_open"},
    ),
    "xai-org/RealworldQA": dataclasses.replace(_VQA, prompt_template="{question}"),
    "charts": dataclasses.replace(
        _VQA, answer_column="answers", family_column="family", prompt_template="{question}"
    ),
}

DATASETS: dict[str, DatasetSpec] = _REGISTERED | {
    name.replace("lmms-lab/", "lmms-lab-encoder/"): spec
    for name, spec in _REGISTERED.items()
    if name.startswith("lmms-lab/")
}
"""Registered datasets by name on the hub; `name#config` where a configuration differs from the rest."""

TELLTALES = {
    "HuggingFaceM4/ChartQA": ("human_or_machine",),
    "lmms-lab/DocVQA": ("question_types", "ucsf_document_id"),
    "lmms-lab/DocVQA#InfographicVQA": ("answer_type", "operation/reasoning"),
    "lmms-lab/GQA": ("imageId", "fullAnswer"),
    "lmms-lab/ChartQAPro": ("Scoring", "Question Type"),
    "derek-thomas/ScienceQA": ("lecture", "skill"),
}
"""Columns of registered datasets that no other has: a table with them is a copy, whatever its name."""


def split_columns(names: str) -> list[str]:
    """Split names of columns at commas."""
    return [name.strip() for name in names.split(",")]


def register_dataset(name: str, spec: DatasetSpec) -> None:
    """Add a dataset to the registry, or replace one; `name#config` names one configuration of it."""
    DATASETS[name] = spec
