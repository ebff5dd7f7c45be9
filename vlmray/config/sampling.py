"""Options of how answers are drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vlmray.config.common import Options, shared_options
from vlmray.config.marks import option
from vlmray.errors import OptionError
from vlmray.schema import Sampling


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Options):
    """How answers are drawn; what is None is as in `vlmray.schema.Sampling`."""

    temperature: float = option(0.0, affects="result")
    """Sampling temperature; 0 is greedy."""

    top_p: float = option(1.0, affects="result")
    """Nucleus sampling: the smallest set of tokens with this probability."""

    top_k: int | None = option(None, affects="result")
    """Sample among this many of the likeliest tokens; default, and 0: among all."""

    min_p: float | None = option(None, affects="result")
    """Sample among tokens of at least this share of the likeliest one's probability; default: 0."""

    repetition_penalty: float | None = option(None, affects="result")
    """Divide the scores of tokens that prompt or answer hold, 1 is none; default: the model's generation
    config."""

    presence_penalty: float | None = option(None, affects="result")
    """Take this off the scores of tokens that the answer holds; default: 0."""

    frequency_penalty: float | None = option(None, affects="result")
    """Take this off the score of a token for each time that the answer holds it; default: 0."""

    min_new_tokens: int | None = option(None, affects="result")
    """Tokens to generate per answer, at least; default: 0."""

    num_samples: int = option(1, affects="derived")
    """Answers to draw to each row, at a --temperature above 0: the prediction is what most of them say."""

    response_schema: str | None = option(None, affects="derived")
    """File of a JSON schema: every answer is JSON that keeps it."""

    response_choices: str | None = option(None, affects="result")
    """Every answer is one of these texts: 'yes,no', or as JSON where a text holds a comma: '["1,5", "2"]'."""

    response_regex: str | None = option(None, affects="result")
    """Every answer is a text that this regular expression matches as a whole, in the syntax of Rust's regex:
    '[0-9]+%?'."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, problem in sampling_problems(self):
            raise OptionError(name, problem)
        if self.num_samples > 1 and self.temperature == 0:
            raise OptionError(
                "num_samples",
                f"{self.num_samples} would draw the same answer each time, as --temperature is 0",
                "pass a --temperature such as 0.7",
            )
        given = [name for name in _FORMS if getattr(self, name) is not None]
        if len(given) > 1:
            raise OptionError(given[1], f"is one form of answers, and --{given[0]} another", "pass one")
        if given and self.min_new_tokens:
            raise OptionError(
                "min_new_tokens", f"goes on where --{given[0]} lets an answer end", "leave it out"
            )
        self.choices()

    def choices(self) -> tuple[str, ...]:
        """Return the texts of which every answer is to be one; none where it may be another."""
        text = self.response_choices
        if text is None:
            return ()
        try:
            found = json.loads(text) if text.lstrip().startswith("[") else text.split(",")
            choices = tuple(choice.strip() for choice in found)
        except (ValueError, AttributeError) as error:
            raise OptionError("response_choices", f"is no JSON list of texts: {text}") from error
        repeated = [choice for choice in choices if choices.count(choice) > 1]
        if "" in choices or not choices:
            raise OptionError("response_choices", f"has an empty choice: {text!r}")
        if repeated:
            raise OptionError("response_choices", f"has {repeated[0]!r} twice")
        return choices


@dataclass(frozen=True, kw_only=True)
class ReuseConfig(SamplingConfig):
    """Which answers are taken over from earlier runs."""

    answer_cache: str | None = option(None, affects="run", engines=("transformers", "vllm", "openai"))
    """Keep greedy answers over runs: a local folder, or a URI that every node can write. What an earlier run
    was answered by the same model, to the same question, images and options, is not asked again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answer_cache is not None and self.temperature > 0:
            raise OptionError(
                "answer_cache",
                f"keeps greedy answers, and --temperature {self.temperature:g} draws others each time",
                "leave out one of the two",
            )


@dataclass(frozen=True, kw_only=True)
class ConfidenceConfig(Options):
    """Whether it is written how sure the model was."""

    confidence: bool | None = option(None, affects="run")
    """Write with each answer how likely the model held it, whole and at its least likely token; default: yes,
    unless a server is asked (--endpoint)."""

    target_accuracy: float | None = option(None, affects="run")
    """Report from which confidence on so large a share of answers is right, 0.95 for example, and how much of
    the work they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        target = self.target_accuracy
        if target is not None and not 0 < target < 1:
            raise OptionError("target_accuracy", f"must be a share above 0 and below 1, got {target:g}")
        if target is not None and self.confidence is False:
            raise OptionError(
                "target_accuracy", "goes by what --confidence false leaves out", "leave out one of the two"
            )

    def wanted_logprobs(self, *, asks_server: bool) -> int | None:
        """Return what is asked of each token: its own log-probability, or None for nothing.

        Args:
            asks_server: Whether a server answers that somebody else runs: it may not know, or charge for it.
        """
        wanted = self.confidence
        if wanted is None:
            wanted = not asks_server or self.target_accuracy is not None
        return 0 if wanted else None


_FORMS = ("response_schema", "response_choices", "response_regex")


_BOUNDS: dict[str, tuple[str, float, float]] = {
    "max_new_tokens": ("at least 1", 1, math.inf),
    "min_new_tokens": ("at least 0", 0, math.inf),
    "temperature": ("at least 0", 0, math.inf),
    "top_p": ("above 0 and at most 1", math.ulp(0.0), 1),
    "top_k": ("at least 0", 0, math.inf),
    "min_p": ("from 0 to 1", 0, 1),
    "repetition_penalty": ("from 0.01 to 100", 0.01, 100),
    "presence_penalty": ("from -2 to 2", -2, 2),
    "frequency_penalty": ("from -2 to 2", -2, 2),
    "num_samples": ("from 1 to 64", 1, 64),
    "num_logprobs": ("from 0 to 20", 0, 20),
}
"""What each setting has to be: in words, and the smallest and largest value."""


def sampling_problems(settings: SamplingConfig | Sampling) -> Iterator[tuple[str, str]]:
    """Yield the name of each setting that is out of range, and what is wrong with it."""
    for name, (expected, least, most) in _BOUNDS.items():
        value = getattr(settings, name, None)
        if value is not None and not (least <= value <= most and math.isfinite(value)):
            yield name, f"must be {expected}, got {value}"
    fewest, limit = (getattr(settings, f"{end}_new_tokens", None) for end in ("min", "max"))
    if fewest is not None and limit is not None and fewest > limit:
        yield "min_new_tokens", f"must be at most max_new_tokens, {limit}, got {fewest}"


def sampling_of(config: object) -> dict[str, Any]:
    """Return the settings that a config gives, as keywords of a `Sampling`."""
    settings = shared_options(config, Sampling)
    return {name: value for name, value in settings.items() if value is not None}
