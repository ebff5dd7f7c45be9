"""How answers are drawn, by request and by the model's own settings, each row by itself."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from helpers.engines import (
    copy_no_rows,
    generate_alone,
    make_mixed_requests,
    make_request,
    text_request,
    texts,
)
from vlmray.builtin.models import BUILTIN_FOLDER
from vlmray.engines.base import check_request
from vlmray.engines.fake import FakeEngine
from vlmray.models.source import ModelSource, settings_not_followed, warn_of_settings
from vlmray.schema import GenerationRequest

SETTINGS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.7},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 1.0},
    {"min_new_tokens": 9},
    {"ignore_eos": True, "max_new_tokens": 40},
    {"stop_token_ids": tuple(range(40, 200, 3))},
    {"temperature": 0.8, "top_k": 3},
    {"temperature": 0.8, "min_p": 0.2, "frequency_penalty": -0.5},
]


def mixed() -> list[GenerationRequest]:
    """Rows of all settings, with and without images, that end after few tokens or many."""
    return [
        make_request(
            3 * number + kind, kind, **{"max_new_tokens": 24 if (number + kind) % 3 else 10} | options
        )
        for number, options in enumerate(SETTINGS)
        for kind in range(3)
    ]


@pytest.mark.parametrize("shared", [True, False])
def test_no_setting_of_a_row_reaches_another(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    requests = mixed()
    alone = make_engine(batch_size=1).generate(requests)
    order = list(range(len(requests)))
    random.Random(0).shuffle(order)
    engine = make_engine(batch_size=16)
    if not shared:
        copy_no_rows(engine, monkeypatch)
    found = engine.generate([requests[place] for place in order])
    assert found == [alone[place] for place in order]
    plain = make_engine().generate(
        [
            dataclasses.replace(
                make_request(0), request_id=r.request_id, messages=r.messages, images=r.images,
                max_new_tokens=r.max_new_tokens,
            )
            for r in requests
        ]
    )  # fmt: skip
    changed = {number // 3 for number in range(len(requests)) if alone[number] != plain[number]}
    assert changed == set(range(1, len(SETTINGS))), "settings without an effect"


@pytest.mark.parametrize("penalty", [1.05, 1.5])
def test_a_penalty_asked_for_is_that_of_a_model_that_has_it(
    model: Any, processor: Any, make_engine: Any, own_settings: GenerationConfig, penalty: float
) -> None:
    asked = [dataclasses.replace(r, repetition_penalty=penalty) for r in make_mixed_requests(6)]
    found = texts(make_engine().generate(asked))
    own_settings.repetition_penalty = penalty
    assert found == [generate_alone(model, processor, request) for request in asked]
    unset = [dataclasses.replace(request, repetition_penalty=None) for request in asked]
    assert texts(make_engine().generate(unset)) == found
    own_settings.repetition_penalty = 1.0
    assert texts(make_engine().generate(unset)) != found


@pytest.fixture
def own_settings(model: Any) -> Iterator[GenerationConfig]:
    """The model's generation config, to change for a test."""
    before = copy.deepcopy(model.generation_config)
    yield model.generation_config
    model.generation_config = before


FOLLOWED: list[dict[str, Any]] = [
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[number] for number in range(60, 120)]},
    {"suppress_tokens": list(range(30, 150))},
    {"begin_suppress_tokens": list(range(20, 250))},
    {"min_new_tokens": 8},
    {"min_length": 45},
    {"sequence_bias": [[[number], -4.0] for number in range(40, 140)]},
    {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "min_new_tokens": 4},
]


@pytest.mark.parametrize("settings", FOLLOWED, ids=lambda settings: "+".join(settings))
def test_settings_of_the_model_that_look_at_one_row_are_followed(
    model: Any, processor: Any, make_engine: Any, own_settings: GenerationConfig, settings: dict[str, Any]
) -> None:
    requests = [make_request(n, n % 3, max_new_tokens=24 if n % 3 else 10) for n in range(6)]
    plain = texts(make_engine().generate(requests))
    own_settings.update(**settings)
    expected = [generate_alone(model, processor, request) for request in requests]
    assert expected != plain
    assert texts(make_engine(batch_size=4).generate(requests)) == expected


def test_bad_words_of_two_tokens_are_followed(
    model: Any, processor: Any, make_engine: Any, own_settings: GenerationConfig
) -> None:
    requests = make_mixed_requests(6)
    plain = texts(make_engine().generate(requests))
    said = [processor.tokenizer(text)["input_ids"] for text in plain]
    own_settings.update(bad_words_ids=[list(pair) for ids in said for pair in itertools.pairwise(ids)])
    expected = [generate_alone(model, processor, request) for request in requests]
    assert expected != plain
    assert texts(make_engine(batch_size=8).generate(requests)) == expected


NOT_FOLLOWED: list[dict[str, Any]] = [
    {"num_beams": 4},
    {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 2.0, "early_stopping": True},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"dola_layers": "high"},
    {"guidance_scale": 1.5},
    {"forced_eos_token_id": 5},
    {"stop_strings": ["a"]},
    {"exponential_decay_length_penalty": [1, 5.0]},
    {"encoder_repetition_penalty": 1.5},
    {"max_time": 0.001},
    {"token_healing": True},
]


@pytest.mark.parametrize("settings", NOT_FOLLOWED, ids=lambda settings: "+".join(settings))
def test_other_settings_change_no_answer_and_are_named(
    make_engine: Any, own_settings: GenerationConfig, settings: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    requests = make_mixed_requests(4)
    plain = make_engine().generate(requests)
    own_settings.update(**settings)
    assert make_engine().generate(requests) == plain
    caplog.clear()
    warn_of_settings("mine", vars(own_settings))
    assert len(caplog.messages) == 1
    assert next(iter(settings)) in caplog.messages[0]
    assert "\n" not in caplog.messages[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}, {"max_length": 5},
        {"max_new_tokens": 1}, {"output_scores": True, "return_dict_in_generate": True}, {"use_cache": False},
        {"do_sample": True, "temperature": 0.1, "top_p": 0.001, "top_k": 1, "min_p": 0.5, "typical_p": 0.3},
        {"num_beams": 1, "guidance_scale": 1.0, "num_return_sequences": 1},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_requests_decide_or_that_change_no_text_are_passed_over(
    make_engine: Any, own_settings: GenerationConfig, settings: dict[str, Any]
) -> None:
    requests = make_mixed_requests(4)
    plain = make_engine().generate(requests)
    own_settings.update(**settings)
    assert make_engine().generate(requests) == plain
    assert settings_not_followed(vars(own_settings)) == {}


def test_the_driver_of_a_job_names_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUILTIN_FOLDER, folder)
    ModelSource.open(str(folder))
    assert caplog.messages == []
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "num_beams": 4, "top_k": 3}))
    ModelSource.open(str(folder))
    assert [message.partition(",")[0] for message in caplog.messages] == [
        f"{folder}: its generation_config.json has num_beams=4"
    ]


def test_the_model_keeps_its_own_settings(model: Any, make_engine: Any) -> None:
    before = model.generation_config
    make_engine().generate(make_mixed_requests(3))
    assert model.generation_config is before
    assert make_engine().generate([make_request(1, adapter="missing")])[0].error is not None
    assert model.generation_config is before


def test_stop_texts_count_behind_the_least_number_of_tokens(make_engine: Any) -> None:
    engine, request = make_engine(), make_request(1, max_new_tokens=16)
    whole = engine.generate([request])[0].text
    stop = (whole[0],)
    assert engine.generate([dataclasses.replace(request, stop=stop)])[0].text == ""
    late = engine.generate([dataclasses.replace(request, stop=stop, min_new_tokens=4)])[0]
    assert late.num_completion_tokens >= 4
    assert late.text.startswith(whole[0])


def test_a_stop_token_ends_the_answer_and_is_no_text(model: Any, processor: Any, make_engine: Any) -> None:
    engine, request = make_engine(), make_request(1, max_new_tokens=12)
    inputs = processor(text=engine.generate([request])[0].prompt, images=request.images, return_tensors="pt")
    ids = model.generate(**inputs.to(model.device), do_sample=False, max_new_tokens=12)[0].tolist()
    ids = ids[inputs["input_ids"].shape[1] :]
    third = next(place for place in range(2, 12) if ids[place] not in ids[:place])
    found = engine.generate(
        [dataclasses.replace(request, stop_token_ids=(ids[third], 10**30, -5), min_new_tokens=2)]
    )[0]
    assert (found.num_completion_tokens, found.finish_reason) == (third + 1, "stop")
    assert found.text == processor.decode(ids[:third], skip_special_tokens=True)


def test_an_answer_goes_on_with_the_last_message(make_engine: Any) -> None:
    engine, request = make_engine(), make_request(1, max_new_tokens=12)
    whole = engine.generate([request])[0]
    half = whole.text[: len(whole.text) // 2]
    turns = [*request.messages, {"role": "assistant", "content": [{"type": "text", "text": half}]}]
    asked = dataclasses.replace(
        request, messages=turns, continue_final_message=True, add_generation_prompt=False
    )
    assert engine.generate([asked])[0].prompt == whole.prompt + half
    bare = dataclasses.replace(request, add_generation_prompt=False)
    assert whole.prompt.startswith(engine.generate([bare])[0].prompt)
    assert len(engine.generate([bare])[0].prompt) < len(whole.prompt)
    both = dataclasses.replace(asked, add_generation_prompt=True)
    assert "add_generation_prompt" in str(engine.generate([both])[0].error)


def test_variables_reach_the_chat_template_if_it_knows_them(
    processor: Any, make_engine: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, request = make_engine(), make_request(1, 0)
    before = engine.generate([request])[0]
    asked = dataclasses.replace(
        request, chat_template_kwargs={"mood": "gay", "tokenise": [1], "padding": True}
    )
    assert engine.generate([asked])[0] == before
    monkeypatch.setattr(processor, "chat_template", processor.chat_template + "{{ mood }}")
    assert engine.generate([asked])[0].prompt == f"{before.prompt}gay"
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"min_p": 1.5}, "min_p must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be from 0.01 to 100"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty must be from -2 to 2"),
        ({"frequency_penalty": 3}, "frequency_penalty must be from -2 to 2"),
        ({"min_new_tokens": 20}, "min_new_tokens must be at most max_new_tokens, 12"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_request(make_request(1, **options))


def test_what_needs_no_model_is_refused_before_it(make_engine: Any, tiny_model: Path) -> None:
    for engine in (make_engine(), FakeEngine(max_model_len=50)):
        assert engine.check(make_request(1)) is None
        limit = engine.max_model_len
        failed = engine.check(text_request("word " * 60_000))
        assert failed.error_code == "context_length_exceeded"
        assert str(limit) in failed.error
        assert failed == engine.generate([text_request("word " * 60_000)])[0]
        assert engine.check(make_request(1, top_p=0.0)).finish_reason == "error"
