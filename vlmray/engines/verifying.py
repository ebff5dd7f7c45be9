"""`--verify_adapter`: is an adapter answered as PEFT alone would answer it?

    probes -> plain forward pass, without and with PEFT's adapter -> Scores
    probes -> the engine, without and with the adapter it loaded  -> Scores -> check_agreement

A probe is a question that says nothing, without and with a picture; what is compared are the scores of the
first token of an answer. Neither is about what the adapter was trained on, so what an adapter changes there
may be little, and a fault below what rounding changes goes unseen.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from vlmray.config import EngineConfig
from vlmray.errors import OptionError, one_line
from vlmray.models.adapters import peft_model
from vlmray.models.loading import first_logits, load_checkpoint
from vlmray.schema import GenerationRequest

_LOG = logging.getLogger(__name__)

NUM_SCORES = 20
"""Likeliest tokens of which an engine has to give the scores."""

_ROUNDING = {torch.float32: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
"""What scores, which are logarithms, may differ by in a precision: logits near 20 are an eighth apart in
bfloat16, and every layer adds its own."""

_CLEAR, _USUAL, _MOST_OFF = 4.0, 0.05, 0.2
"""An effect that is, on average, so many times what the base's scores are off by, or this share of rounding,
has to be PEFT's to a fifth."""

TokenScores = Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model without and with an adapter says of the next token of each probe."""

    base: Sequence[TokenScores]
    adapted: Sequence[TokenScores]


def probes() -> list[GenerationRequest]:
    """Return the questions, without and with a picture."""
    grey = Image.linear_gradient("L").resize((112, 112))
    picture: Image.Image | bytes = Image.merge("RGB", [grey, grey.rotate(90), grey.rotate(180)])
    text = {"type": "text", "text": "What does the picture show? Say it in a few words."}
    return [
        GenerationRequest(
            request_id=f"probe-{len(images)}",
            messages=[{"role": "user", "content": [*({"type": "image"} for _ in images), text]}],
            images=images,
            max_new_tokens=1,
        )
        for images in ([], [picture])
    ]


def score_by_peft(model: Any, processor: Any, adapter: str) -> Scores:
    """Score the probes by plain passes of a bare base, and of it with an adapter that PEFT puts on it."""
    base = _score_plainly(model, processor)
    with peft_model(model, adapter) as adapted:
        return Scores(base, _score_plainly(adapted, processor))


def score_apart(model_id: str, config: EngineConfig, adapters: Sequence[str]) -> dict[str, Scores]:
    """Score the probes with each adapter in a process of its own, whose memory is free again afterwards.

    Raises:
        OptionError: The model cannot be loaded by transformers, or not with an adapter.
    """
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return process.submit(_load_and_score, model_id, config, adapters).result()
    except OptionError:
        raise
    except Exception as error:  # whatever loading raises, or the end of the process for lack of memory
        problem = f"needs the model as transformers loads it, which failed: {one_line(error)}"
        raise OptionError("verify_adapter", problem, "leave it out, or fix that") from error


def _load_and_score(model_id: str, config: EngineConfig, adapters: Sequence[str]) -> dict[str, Scores]:
    model, processor = load_checkpoint(model_id, config)
    return {adapter: score_by_peft(model, processor, adapter) for adapter in adapters}


def _score_plainly(model: Any, processor: Any) -> list[TokenScores]:
    logits = (first_logits(model, processor, request) for request in probes())
    return [dict(enumerate(each.log_softmax(-1).tolist())) for each in logits]


def likeliest(scores: torch.Tensor) -> TokenScores:
    """Return the scores (V,) of the likeliest tokens."""
    found = scores.topk(min(NUM_SCORES, len(scores)))
    return dict(zip(found.indices.tolist(), found.values.tolist(), strict=True))


def check_agreement(adapter: str, plain: Scores, served: Scores, dtype: torch.dtype) -> None:
    """Refuse an adapter that an engine answers otherwise than PEFT does, or without effect.

    Args:
        adapter: As the user gave it.
        plain: Scores of all tokens.
        served: Scores that the engine gave, of some tokens.
        dtype: The engine's.

    Raises:
        OptionError: It is answered otherwise.
    """
    noise, deviation = _distance(served.base, plain.base), _distance(served.adapted, plain.adapted)
    effect = max(
        abs(after[token] - before[token])
        for before, after, found in zip(plain.base, plain.adapted, served.adapted, strict=True)
        for token in found
    )
    rounding = _ROUNDING.get(dtype, _ROUNDING[torch.bfloat16])
    _LOG.info(
        "%s changes the probes' scores by %.3g; the engine's are PEFT's to %.3g, of the base to %.3g",
        adapter, effect, deviation, noise,
    )  # fmt: skip
    share = _find_share(plain, served, _USUAL * rounding)
    problem = None
    if effect > 0 and served.adapted == served.base:
        problem = f"changes no score here, and by {effect:.3g} in a plain pass of PEFT"
    elif deviation > rounding or noise > rounding:
        problem = (
            f"is answered otherwise than by a plain pass of PEFT: the scores of a probe differ by "
            f"{deviation:.3g}, those of the base by {noise:.3g}, and rounding explains {rounding:g}"
        )
    elif share is not None and abs(share - 1) > _MOST_OFF:
        problem = f"has {share:.0%} of the effect that a plain pass of PEFT shows"
    if problem is not None:
        raise OptionError("verify_adapter", f": {adapter} {problem}", "merge it into its base")


def _find_share(plain: Scores, served: Scores, usual: float) -> float | None:
    """Return how much of PEFT's effect an engine shows, over all tokens; None where rounding hides it."""
    effect = noise = product = 0.0
    for place, (base, adapted) in enumerate(zip(served.base, served.adapted, strict=True)):
        for token in base.keys() & adapted.keys():
            before = plain.base[place][token]
            change = plain.adapted[place][token] - before
            effect += change**2
            noise += max(abs(base[token] - before), usual) ** 2
            product += change * (adapted[token] - base[token])
    return product / effect if effect > _CLEAR**2 * noise else None


def _distance(found: Sequence[TokenScores], expected: Sequence[TokenScores]) -> float:
    """Return the largest difference of any score that was given."""
    pairs = zip(found, expected, strict=True)
    return max(abs(score - other[token]) for mine, other in pairs for token, score in mine.items())
