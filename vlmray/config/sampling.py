"""Options of how answers are drawn."""

from __future__ import annotations

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

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, problem in sampling_problems(self):
            raise OptionError(name, problem)


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
