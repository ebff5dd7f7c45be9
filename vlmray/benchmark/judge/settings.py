"""The file of `--judge`: which server grades answers, by what prompt and scale."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmray.config import EndpointConfig
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
_LARGEST_FILE = 2**20

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
    model_id: str
    scale: Mapping[str, float] = field(default_factory=lambda: {"correct": 1.0, "partly": 0.5, "wrong": 0.0})
    """What each grade is worth, from 0 to 1."""

    prompt_template: str = _PROMPT
    with_images: bool = True
    max_new_tokens: int = 512
    num_twice: int = 100
    """Answers that are graded a second time, with the grades named in the opposite order."""

    max_in_flight: int | None = None
    endpoint_timeout_s: float = 120.0

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
    expected = 'expected {"endpoint": "http://HOST:PORT", "model_id": NAME} and what else differs'
    try:
        file = Path(path).expanduser()
        if file.stat().st_size > _LARGEST_FILE:
            raise OptionError("judge", f"{path} has more than {_LARGEST_FILE:,} bytes", expected)
        found = json.loads(file.read_text(encoding="utf-8"))
    except OptionError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError("judge", f"{path}: {error}", expected) from error
    if not isinstance(found, dict):
        raise OptionError("judge", f"{path} holds no mapping", expected)
    kinds = {item.name: item for item in dataclasses.fields(JudgeConfig)}
    if unknown := sorted(found.keys() - kinds.keys()):
        raise OptionError("judge", f"{path} has {unknown[0]!r}", f"expected {', '.join(kinds)}")
    for name in ("endpoint", "model_id"):
        if name not in found:
            raise OptionError("judge", f"{path} has no {name}", expected)
    if problem := _problem(found):
        raise OptionError("judge", f"{path}: {problem}")
    judge = JudgeConfig(**found)
    try:  # the rules of an endpoint are those of its options
        EndpointConfig(
            endpoint=judge.endpoint,
            max_in_flight=judge.max_in_flight,
            endpoint_timeout_s=judge.endpoint_timeout_s,
        )
    except ValueError as error:
        raise OptionError("judge", f"{path}: {error}") from error
    return judge


def _problem(found: Mapping[str, Any]) -> str | None:
    """Say what is wrong with the values of a file, if anything is."""
    for name, kind in _KINDS.items():
        value = found.get(name)
        is_flag = isinstance(value, bool)
        if name in found and (not isinstance(value, kind) or is_flag != (kind is bool)):
            return f"{name} is {value!r}"
    for name, least in (("max_new_tokens", 1), ("num_twice", 0)):
        if found.get(name, least) < least:
            return f"{name} is {found[name]}, and {least} is the least"
    if (problem := _scale_problem(found.get("scale"))) is not None:
        return problem
    template = found.get("prompt_template", _PROMPT)
    named = _PLACE.findall(template)
    if wrong := [name for name in dict.fromkeys(named) if name not in PLACES]:
        return f"prompt_template names {{{wrong[0]}}}; it may name {', '.join(map('{{{}}}'.format, PLACES))}"
    if missing := [name for name in PLACES if name not in named]:
        return f"prompt_template does not name {{{missing[0]}}}"
    return None


def _scale_problem(scale: Mapping[str, Any] | None) -> str | None:
    if scale is None:
        return None
    values = [value for value in scale.values() if type(value) in (int, float)]
    if len(scale) < 2 or len(values) < len(scale) or not all(0 <= value <= 1 for value in values):
        return f"scale is {dict(scale)}; expected two grades or more, each worth 0 to 1"
    if len(set(values)) < 2:
        return f"scale is {dict(scale)}; its grades are all worth the same"
    if odd := [word for word in scale if not _WORD.fullmatch(word)]:
        return f"scale has {odd[0]!r}; expected grades of letters and digits"
    if len({word.casefold() for word in scale}) < len(scale):
        return "scale has a grade twice"
    return None


_KINDS: dict[str, Any] = {
    "endpoint": str, "model_id": str, "scale": dict, "prompt_template": str, "with_images": bool,
    "max_new_tokens": int, "num_twice": int, "max_in_flight": int, "endpoint_timeout_s": (int, float),
}  # fmt: skip
