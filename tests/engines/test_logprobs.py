"""How likely tokens were: what a plain forward pass of each row alone says, whatever the engine shares."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import pad

from helpers.adapters import build_adapter
from helpers.engines import (
    JSON,
    Readers,
    decode,
    load,
    make_formed_requests,
    make_mixed_requests,
    make_request,
    make_shared_requests,
    text_request,
)
from vlmray.engines import build_engine
from vlmray.engines.base import Engine
from vlmray.engines.logprobs import TokenTexts, from_json, to_json
from vlmray.engines.rows import end_ids
from vlmray.engines.transformers.grammars import Grammars, allow
from vlmray.models.processors import load_processor
from vlmray.models.source import resolve_model_id
from vlmray.schema import Completion, GenerationRequest, TokenLogprob

CLOSE = {"abs": 1e-5, "rel": 1e-6}  # float32 has no more digits of what is below -10


def asking(requests: Sequence[GenerationRequest]) -> list[GenerationRequest]:
    """Let rows ask for the likeliest tokens, for their own alone, or for nothing, in turn."""
    wanted = itertools.cycle((3, 0, None))
    return [dataclasses.replace(each, num_logprobs=next(wanted)) for each in requests]


class Reference:
    """A model and its processor, without the engine."""

    def __init__(self, model: Any, processor: Any) -> None:
        self._model, self._processor = model, processor
        tokenizer = processor.tokenizer
        texts = TokenTexts(tokenizer)
        described = [texts.describe(token_id, 0.0) for token_id in range(len(tokenizer))]
        self._ids = {(each.token, each.data): token_id for token_id, each in enumerate(described)}
        assert len(self._ids) == len(described)  # else a token may be taken for another
        self._grammars = Grammars(tokenizer, end_ids(model.generation_config))

    def ids(self, tokens: Sequence[TokenLogprob]) -> list[int]:
        return [self._ids[each.token, each.data] for each in tokens]

    def logprobs(self, request: GenerationRequest, answer: Sequence[int]) -> torch.Tensor:
        """What one pass over prompt and answer says of each token of the answer: (tokens, vocabulary)."""
        prompt = self._processor.apply_chat_template(request.messages, add_generation_prompt=True)
        inputs = dict(self._processor(text=prompt, images=request.images or None, return_tensors="pt"))
        for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
            if name in inputs:
                inputs[name] = pad(inputs[name], (0, len(answer)), value=value)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
        with torch.inference_mode():
            logits = self._model(
                **{name: value.to(self._model.device) for name, value in inputs.items()}
            ).logits
        scores = logits[0, -len(answer) - 1 : -1].double().cpu()
        if request.form is not None:
            matcher = self._grammars.matcher(request.form)
            for place, token_id in enumerate(answer):
                scores[place] = allow(scores[place : place + 1], [matcher])[0]
                matcher.consume_token(token_id)
        return scores.log_softmax(-1)

    def check(self, request: GenerationRequest, completion: Completion) -> None:
        assert completion.error is None
        if request.num_logprobs is None:
            assert completion.logprobs is None
            return
        found = completion.logprobs
        assert found is not None
        assert len(found) == completion.num_completion_tokens
        answer = self.ids(found)
        expected = self.logprobs(request, answer)
        for token_id, token, scores in zip(answer, found, expected, strict=True):
            assert token.logprob == pytest.approx(float(scores[token_id]), **CLOSE)
            best = [value for value in scores.topk(request.num_logprobs).values.tolist() if value > -math.inf]
            mine = [other.logprob for other in token.top if other.logprob > -math.inf]
            assert mine == pytest.approx(best, **CLOSE)
            others = [float(scores[each]) for each in self.ids(token.top)]
            assert [each for each in others if each > -math.inf] == pytest.approx(best, **CLOSE)


@pytest.fixture(scope="module")
def folder() -> Path:
    """The built-in model: what a random one amplifies of rounding is more than is compared here."""
    return Path(resolve_model_id("builtin"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder).float()


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return load_processor(str(folder))


@pytest.fixture(scope="module")
def reference(model: Any, processor: Any) -> Reference:
    return Reference(model, processor)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize(
    "requests",
    [
        make_mixed_requests(),
        make_mixed_requests(9, temperature=2.0, top_p=0.9, top_k=50, seed=5, repetition_penalty=1.5),
        make_shared_requests(),
        make_shared_requests(2, num_logprobs=2, presence_penalty=0.5),
        make_formed_requests(repetition_penalty=1.3),
    ],
    ids=["mixed", "sampled", "shared", "shared and penalized", "formed"],
)
def test_they_are_those_of_a_plain_forward_pass(
    reference: Reference, make_engine: Any, requests: list[GenerationRequest], batch_size: int
) -> None:
    asked = asking(requests)
    completions = make_engine(batch_size=batch_size).generate(asked)
    for request, completion in zip(asked, completions, strict=True):
        is_encoded = any(isinstance(image, bytes) for image in request.images)
        reference.check(decode(request) if is_encoded else request, completion)
    assert sum(completion.logprobs is not None for completion in completions) == len(
        [each for each in asked if each.num_logprobs is not None]
    )


def test_they_change_no_answer(make_engine: Any) -> None:
    requests = [*make_formed_requests(), *make_mixed_requests(temperature=0.9, repetition_penalty=1.2)]
    assert make_engine().generate(asking(requests)) == make_engine().generate(requests)


def test_adapters_have_their_own(
    folder: Path, model: Any, processor: Any, make_engine: Any, tmp_path: Path
) -> None:
    adapters = {
        name: build_adapter(tmp_path / name, folder, seed=seed, lora_alpha=1, **options)
        for seed, (name, options) in enumerate({"plain": {}, "apart": {"use_dora": True}}.items())
    }
    names = [None, *adapters]
    requests = [
        make_request(number, number % 3, adapter=names[number % 3], num_logprobs=1, temperature=1.0)
        for number in (0, 1, 2, 4, 5, 6)
    ]
    engine = make_engine()
    for name, path in adapters.items():
        engine.load_adapter(name, str(path))
    completions = engine.generate(requests)
    for name in names:
        bare = copy.deepcopy(model)
        adapted = bare if name is None else PeftModel.from_pretrained(bare, adapters[name]).eval()
        plain = Reference(adapted, processor)
        for request, completion in zip(requests, completions, strict=True):
            if request.adapter == name:
                plain.check(request, completion)


def test_a_batch_that_is_halved_tells_of_each_token_once(
    reference: Reference, make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(batch_size=8)
    requests = make_mixed_requests(8, num_logprobs=0)
    run, calls = engine.forward.run, []

    def run_out_of_memory(rows: Any, listener: Any) -> None:
        calls.append(len(rows))
        run(rows, listener) if len(calls) > 1 else _fail_late(run, rows, listener)

    monkeypatch.setattr(engine.forward, "run", run_out_of_memory)
    told: dict[int, list[TokenLogprob]] = {place: [] for place in range(len(requests))}
    completions = engine.generate(requests, on_logprobs=lambda place, new: told[place].extend(new))
    assert len(calls) > 2
    for place, (request, completion) in enumerate(zip(requests, completions, strict=True)):
        reference.check(request, completion)
        assert len(told[place]) == len(completion.logprobs)


def _fail_late(run: Any, rows: Any, listener: Any) -> None:
    """Fail once some tokens were told of."""
    longest = max(rows, key=lambda row: row.max_new_tokens)

    def fail(place: int, new: Any) -> None:
        heard(place, new)
        if place == longest.index and longest.num_logprobs_sent == 2:
            raise torch.OutOfMemoryError("in a test")

    heard = listener.on_logprobs
    run(rows, dataclasses.replace(listener, on_logprobs=fail))


@pytest.fixture(params=["transformers", "fake"])
def engine(request: pytest.FixtureRequest, make_engine: Any) -> Engine:
    return make_engine() if request.param == "transformers" else build_engine(engine="fake", model_id="fake")


def test_streamed_they_are_those_of_the_answer_and_come_before_its_text(engine: Engine) -> None:
    requests = asking(make_mixed_requests(9))
    told: list[list[TokenLogprob]] = [[] for _ in requests]
    text = [b""] * len(requests)

    def on_text(place: int, piece: str) -> None:
        text[place] += piece.encode()
        if requests[place].num_logprobs is not None:
            assert b"".join(each.data or b"" for each in told[place]).startswith(text[place])

    completions = engine.generate(
        requests, on_text=on_text, on_logprobs=lambda place, new: told[place].extend(new)
    )
    assert [each.logprobs for each in completions] == [
        None if request.num_logprobs is None else tuple(new)
        for request, new in zip(requests, told, strict=True)
    ]
    assert sum(map(len, told)) > 10
    assert {len(token.top) for new in told for token in new} == {0, 3}


def test_a_row_that_nobody_wants_has_those_of_what_it_got(engine: Engine) -> None:
    readers = Readers({0: 1})
    (left,) = readers.answer(engine, [make_request(1, num_logprobs=0, max_new_tokens=24)])
    assert left.finish_reason == "cancelled"
    assert left.logprobs is not None
    assert len(left.logprobs) == left.num_completion_tokens


@pytest.mark.parametrize("wanted", [-1, 21])
def test_only_so_many_can_be_asked_for(engine: Engine, wanted: int) -> None:
    (found,) = engine.generate([make_request(1, num_logprobs=wanted)])
    assert found.error == f"ValueError: num_logprobs must be from 0 to 20, got {wanted}"


def test_bytes_of_tokens_make_the_text(make_engine: Any) -> None:
    requests = [
        text_request("Say it", max_new_tokens=40, num_logprobs=0, temperature=2.0, seed=n) for n in range(8)
    ]
    requests += [make_request(1, num_logprobs=0, form=JSON, max_new_tokens=60)]
    for found in make_engine().generate(requests):
        assert found.logprobs is not None
        data = b"".join(each.data or b"" for each in found.logprobs)
        assert data.decode(errors="replace") == found.text


@pytest.mark.parametrize("text", ["Straße 5 €: 漢字 🙂", " two  spaces\nand a line"])
def test_texts_of_tokens_are_those_of_the_tokenizer(processor: Any, text: str) -> None:
    tokenizer = processor.tokenizer
    texts = TokenTexts(tokenizer)
    tokens = [texts.describe(token_id, -1.0) for token_id in tokenizer(text)["input_ids"]]
    assert b"".join(each.data or b"" for each in tokens).decode() == text
    assert texts.describe(tokenizer.eos_token_id, -1.0).data is None
    assert texts.describe(tokenizer.eos_token_id, -1.0).token == tokenizer.eos_token


def test_they_travel_as_text(make_engine: Any) -> None:
    (found,) = make_engine().generate([make_request(1, num_logprobs=5, form=JSON)])
    assert found.logprobs
    assert any(other.logprob == -math.inf for each in found.logprobs for other in each.top)
    assert from_json(to_json(found.logprobs)) == found.logprobs
