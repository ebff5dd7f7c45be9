"""What a model cannot do is an error of the row: prompts beyond its positions, scores that are no numbers."""

from __future__ import annotations

import copy
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.engines import make_mixed_requests, make_request, text_request, texts
from vlmray.config import LoadingConfig
from vlmray.engines import build_engine
from vlmray.engines.base import Engine
from vlmray.engines.fake import FakeEngine
from vlmray.engines.transformers.engine import TransformersEngine
from vlmray.errors import ContextLengthError, OptionError
from vlmray.models.loading import find_max_model_len, load_checkpoint
from vlmray.schema import GenerationRequest


@pytest.fixture(params=["transformers", "fake"])
def engine(request: pytest.FixtureRequest, make_engine: Callable[..., TransformersEngine]) -> Engine:
    return FakeEngine() if request.param == "fake" else make_engine()


def test_a_prompt_longer_than_the_positions_is_refused_with_both_numbers(engine: Engine) -> None:
    requests = make_mixed_requests(6)
    expected = engine.generate(requests)
    lengths = [completion.num_prompt_tokens for completion in expected]
    engine.max_model_len = max(lengths)
    completions = engine.generate(requests)
    for length, found, before in zip(lengths, completions, expected, strict=True):
        if length < max(lengths):
            assert before.text.startswith(found.text)
        else:
            assert (found.finish_reason, found.error_code) == ("error", "context_length_exceeded")
            assert f"maximum context length is {length} tokens, and the prompt has {length};" in found.error


def test_an_answer_ends_where_the_positions_do(engine: Engine) -> None:
    request = make_request(1, max_new_tokens=12)
    (whole,) = engine.generate([request])
    engine.max_model_len = whole.num_prompt_tokens + 1
    (cut,) = engine.generate([request])
    assert (cut.finish_reason, cut.num_completion_tokens) == ("length", 1)
    assert whole.text.startswith(cut.text)
    assert whole.num_completion_tokens > 1


def test_a_text_that_is_too_long_is_refused_before_its_image_is_encoded(make_engine: Any) -> None:
    engine = make_engine()
    engine.max_model_len = 100
    long = text_request("How many bars? " * 200)
    unreadable = GenerationRequest(
        request_id="a", messages=make_request(1).messages, images=[b"no image"], max_new_tokens=4
    )
    refused, broken = engine.generate([long, unreadable])
    assert refused.error_code == "context_length_exceeded"
    assert broken.error_code is None


def test_the_error_survives_pickling() -> None:
    error = ContextLengthError(5000, 4096)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert (error.num_tokens, error.max_model_len) == (5000, 4096)


def test_the_builtin_model_refuses_a_question_of_thousands_of_words() -> None:
    engine = build_engine(engine="transformers", model_id="builtin")
    (completion,) = engine.generate([text_request("Ignore this. " * 1000 + "How many bars?")])
    engine.close()
    assert completion.error_code == "context_length_exceeded"
    assert f"maximum context length is {engine.max_model_len} tokens" in str(completion.error)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 10000.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "linear", "factor": 2.0}, 1024),
    ],
)
def test_positions_are_those_after_stretching(model: Any, rope: dict[str, Any], expected: int) -> None:
    config = copy.deepcopy(model.config)
    config.get_text_config().max_position_embeddings = 512
    config.get_text_config().rope_parameters = rope
    assert find_max_model_len(config) == expected


def test_a_config_without_positions_sets_no_limit() -> None:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(rope_parameters=None))
    assert find_max_model_len(config) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("step", [0, 2])
def test_scores_that_are_no_numbers_are_the_error_of_their_row(
    model: Any, make_engine: Any, value: float, step: int
) -> None:
    """One value in the hidden state of one row; the others are answered as ever."""
    requests = make_mixed_requests(6)
    expected = texts(make_engine().generate(requests))
    calls: list[int] = []

    def poison(module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        calls.append(len(calls))
        hidden = args[0].clone()
        if calls[-1] == step:
            hidden[1, -1, 3] = value
        return (hidden,)

    hook = model.lm_head.register_forward_pre_hook(poison)
    try:
        completions = make_engine().generate(requests)
    finally:
        hook.remove()
    failed = [completion for completion in completions if completion.error is not None]
    assert len(failed) == 1
    assert (failed[0].text, failed[0].finish_reason) == ("", "error")
    assert "not finite (NaN or infinity)" in str(failed[0].error)
    pairs = zip(completions, expected, strict=True)
    assert all(completion.text == text for completion, text in pairs if completion.error is None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(
    tiny_model: Path, tmp_path: Path, value: float
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    weights[name].view(-1)[7] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        OptionError, match=r"layers\.1\.mlp\.up_proj\.weight holds values that are not finite"
    ):
        load_checkpoint(str(folder), LoadingConfig())
