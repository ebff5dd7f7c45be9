"""The file of `--judge`: which server grades answers, by what prompt and scale."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmray.config import EndpointConfig
from vlmray.config.common import check_at_least
from vlmray.config.parsing import build_config, read_json_file
from vlmray.engines.openai.client import api_key
from vlmray.errors import OptionError

JUDGE = "judge"
"""Name of its metric."""

JUDGEMENTS = "judgements.jsonl"
"""File of all that the judge said, in the folder of the benchmark."""

JUDGE_KEY = "VLMRAY_JUDGE_API_KEY"
"""Environment variable of its key: that of the server which answers is none of its business."""

PLACES = ("question", "answers", "prediction", "scale")
"""What its prompt has to name in braces."""

_PLACE = re.compile(r"\{(\w+)\}")
_WORD = re.compile(r"\w+(?:[ -]\w+)*")

_PROMPT = """\
Grade an answer to a question about the picture.

Question: {question}
Reference: {answers}
Answer to be graded: {prediction}

Say in one or two sentences what is right and what is wrong about it. Then write your grade, alone on the \
last line: {scale}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeConfig:
    """A judge as its file describes it; the fields of an endpoint mean what the options of that name do."""

    endpoint: str
    """URL of an OpenAI-compatible server."""

    model_id: str
    """What that calls the model."""

    scale: dict[str, float] = field(default_factory=lambda: {"correct": 1.0, "partly": 0.5, "wrong": 0.0})
    """What each grade is worth, from 0 to 1."""

    prompt_template: str = _PROMPT
    with_images: bool = True
    max_new_tokens: int = 512
    num_twice: int = 100
    """Answers that are graded a second time, with the grades named in the opposite order."""

    max_in_flight: int | None = None
    endpoint_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_new_tokens")
        check_at_least(self, 0, "num_twice")
        problems = {
            "scale": _scale_problem(self.scale),
            "prompt_template": _template_problem(self.prompt_template),
        }
        for name, problem in problems.items():
            if problem is not None:
                raise OptionError(name, problem)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return dataclasses.asdict(self)

    def fingerprint(self) -> dict[str, Any]:
        """Return what a grade depends on; the same model may be served elsewhere tomorrow."""
        elsewhere = ("endpoint", "num_twice", "max_in_flight", "endpoint_timeout_s")
        return {name: value for name, value in self.to_json().items() if name not in elsewhere}

    def key(self) -> str | None:
        """Return the key to send."""
        return api_key(self.endpoint, JUDGE_KEY)

    def word(self, question: str, answers: Sequence[str], prediction: str, *, turned: bool) -> str:
        """Write what the judge is asked; `turned` names the grades in the opposite order."""
        names = list(self.scale)[::-1] if turned else list(self.scale)
        values = {
            "question": question, "answers": " | ".join(answers), "prediction": prediction,
            "scale": f"{', '.join(names[:-1])} or {names[-1]}",
        }  # fmt: skip
        return _PLACE.sub(lambda match: values[match[1]], self.prompt_template)

    def read_grade(self, text: str) -> str | None:
        """Return the grade that the last line of the judge's words is; None where it is none."""
        lines = [line for line in text.splitlines() if line.strip()]
        last = re.sub(r"^\W*(?:\w+\s*:)?\W*|\W*$", "", lines[-1]).casefold() if lines else ""
        return next((grade for grade in self.scale if grade.casefold() == last), None)


def read_judge(path: str) -> JudgeConfig:
    """Read the file.

    Raises:
        OptionError: It is not there, or not what it should be.
    """
    expected = 'expected {"endpoint": "http://HOST:PORT", "model_id": "NAME"} and what else differs'
    found = read_json_file("judge", path, dict, expected)
    try:
        judge = build_config(JudgeConfig, found)
        EndpointConfig(  # the rules of an endpoint are those of its options
            endpoint=judge.endpoint,
            max_in_flight=judge.max_in_flight,
            endpoint_timeout_s=judge.endpoint_timeout_s,
        )
    except ValueError as error:
        raise OptionError("judge", f"{path}: {error}") from error
    return judge


def _scale_problem(scale: Mapping[str, Any]) -> str | None:
    values = [value for value in scale.values() if type(value) in (int, float)]
    if len(scale) < 2 or len(values) < len(scale) or not all(0 <= value <= 1 for value in values):
        return f"is {dict(scale)}; expected two grades or more, each worth 0 to 1"
    if len(set(values)) < 2:
        return f"is {dict(scale)}; its grades are all worth the same"
    if odd := [word for word in scale if not _WORD.fullmatch(word)]:
        return f"has {odd[0]!r}; expected grades of letters and digits"
    if len({word.casefold() for word in scale}) < len(scale):
        return "has a grade twice"
    return None


def _template_problem(template: str) -> str | None:
    named = _PLACE.findall(template)
    if wrong := [name for name in dict.fromkeys(named) if name not in PLACES]:
        return f"names {{{wrong[0]}}}; it may name {', '.join(map('{{{}}}'.format, PLACES))}"
    if missing := [name for name in PLACES if name not in named]:
        return f"does not name {{{missing[0]}}}"
    return None
