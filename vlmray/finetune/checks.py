"""Is what was saved what was trained?

What was written is loaded as anyone else would load it, asked what the trained model was asked, and compared
with it.
"""

from __future__ import annotations

import base64
import dataclasses
import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vlmray.config import FinetuneConfig
from vlmray.engines.transformers.engine import TransformersEngine
from vlmray.finetune.results import ADAPTER, MODEL, Check
from vlmray.images.decoding import decode_image
from vlmray.models.loading import load_checkpoint
from vlmray.models.prompts import ChatPrompts
from vlmray.models.source import resolve_model_id
from vlmray.schema import GenerationRequest
from vlmray.training.samples import first_question

_TOLERATED = 0.8
"""Share of equal answers to ask for in lower precisions, where a near tie may fall the other way."""

Answers = Sequence[Mapping[str, Any]]


def check_trained(config: FinetuneConfig, trained: Path, kind: str, answers: Answers) -> tuple[Check, ...]:
    """Load what was written and compare it with the base and with the model that was trained."""
    base = resolve_model_id(config.model_id)
    try:
        if kind == ADAPTER:
            model, processor = _load(config, base, adapter=str(trained))
        else:
            model, processor = _load(config, str(trained))
    except (ValueError, OSError) as error:
        return (_check("loads afresh", False, str(error)),)
    loads = _check("loads afresh", True, f"{kind}/ from safetensors, no missing and no unexpected weight")
    if not answers:
        return (loads, _check("answers as the trained model did", False, "no sample was there to ask"))
    rounded = kind == MODEL and stored_dtype(trained) != "float32"
    name = "answers as the trained model did"
    same = _compare_answers(name, config, model, processor, answers, rounded=rounded)
    logits = _first_logits(model, processor, answers[0])
    if kind == ADAPTER:
        with model.disable_adapter():
            before = _first_logits(model, processor, answers[0])
    else:
        _free(model)
        before = _first_logits(*_load(config, base), answers[0])
    return (loads, _compare_logits("changes the base's logits", logits, before), same)


def check_merged(config: FinetuneConfig, trained: Path, merged: Path, answers: Answers) -> tuple[Check, ...]:
    """Compare the merged model with the unquantized base, and with that base and the adapter beside it."""
    plain = dataclasses.replace(config, quantization="none")
    if not answers:
        return (_check("merged model answers as base and adapter do", False, "no sample was there to ask"),)
    model, processor = _load(plain, resolve_model_id(config.model_id), adapter=str(trained))
    beside = _answer(config, model, processor, answers)
    with model.disable_adapter():
        before = _first_logits(model, processor, answers[0])
    _free(model)
    model, processor = _load(plain, str(merged))
    return (
        _compare_logits(
            "merged model changes the base's logits", _first_logits(model, processor, answers[0]), before
        ),
        _compare_answers(
            "merged model answers as base and adapter do",
            plain,
            model,
            processor,
            beside,
            rounded=stored_dtype(merged) != "float32",
        ),
    )


def _check(name: str, passed: bool, detail: str) -> Check:
    return Check(name=name, passed=passed, detail=detail)


def _load(config: FinetuneConfig, model_id: str, adapter: str | None = None) -> tuple[Any, Any]:
    gc.collect()
    return load_checkpoint(model_id, config, adapter=adapter)


def _free(model: Any) -> None:
    """Give the memory of a model back before the next one is loaded."""
    model.to("meta")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _requests(answers: Answers, max_new_tokens: int = 1) -> list[GenerationRequest]:
    def decode(row: Mapping[str, Any]) -> dict[str, Any]:
        return {**row, "images": [decode_image(base64.b64decode(image)) for image in row["images"]]}

    return [first_question(decode(row), max_new_tokens) for row in answers]


def _answer(config: FinetuneConfig, model: Any, processor: Any, answers: Answers) -> list[dict[str, Any]]:
    engine = TransformersEngine(model, processor)
    completions = engine.generate(_requests(answers, config.max_new_tokens))
    return [
        {**row, "prediction": completion.text} for row, completion in zip(answers, completions, strict=True)
    ]


def stored_dtype(folder: Path) -> str | None:
    """Return the precision of a checkpoint's weights, which are loaded in float32 where there is no GPU."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("dtype", config.get("torch_dtype"))


def _compare_answers(
    name: str,
    config: FinetuneConfig,
    model: Any,
    processor: Any,
    expected: Answers,
    *,
    rounded: bool = False,
) -> Check:
    found = _answer(config, model, processor, expected)
    pairs = zip(found, expected, strict=True)
    differing = [row["sample_id"] for row, other in pairs if row["prediction"] != other["prediction"]]
    num_equal = len(found) - len(differing)
    exact = model.dtype == torch.float32 and config.quantization == "none" and not rounded
    needed = len(found) if exact else _TOLERATED * len(found)
    detail = f"{num_equal} of {len(found)} answers equal"
    if differing:
        precision = "" if exact else "; lower precision may turn a near tie"
        detail += f", not those of {', '.join(differing[:3])}{precision}"
    return _check(name, num_equal >= needed, detail)


def _first_logits(model: Any, processor: Any, row: Mapping[str, Any]) -> torch.Tensor:
    """Return the logits (V,) of the first answer token of a sample, in float32 on the CPU."""
    (request,) = _requests([row])
    prompts = ChatPrompts(processor)
    prompt = prompts.render(request.messages, add_generation_prompt=True)
    images: list[Any] = list(request.images)
    inputs = {name: tensor.to(model.device) for name, tensor in prompts.encode(prompt, images).items()}
    with torch.inference_mode():
        return model(**inputs).logits[0, -1].float().cpu()


def _compare_logits(name: str, logits: torch.Tensor, before: torch.Tensor) -> Check:
    difference = float((logits - before).abs().max())
    return _check(name, difference > 0, f"by {difference:.3g} at most, on one prompt")
