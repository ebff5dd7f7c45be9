"""Fields of requests: what they come to for the engine, and which are refused by name."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from helpers.gateways import MODEL, Backend, ask, data_uri, png, post, says, serving, user
from vlmray.schema import Form, GenerationRequest

IMAGE = {"type": "image_url", "image_url": {"url": data_uri(png())}}
TEXT = {"type": "text", "text": "How many?"}


def asked(url: str, backend: Backend, body: dict[str, Any]) -> GenerationRequest:
    """What the backend is asked for a body that is taken."""
    status, answer, _ = post(url, body)
    assert status == 200, answer
    return backend.requests[-1]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"top_k": 5}, {"top_k": 5}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 0}, {"top_k": 0}),
        ({"logprobs": True}, {"num_logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 20}, {"num_logprobs": 20}),
        ({"logprobs": False, "top_logprobs": 0}, {"num_logprobs": None}),
        ({"min_p": 0.1}, {"min_p": 0.1}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"repetition_penalty": None}, {"repetition_penalty": None}),
        ({"presence_penalty": -2, "frequency_penalty": 0.5},
         {"presence_penalty": -2.0, "frequency_penalty": 0.5}),
        ({"min_tokens": 3, "max_tokens": 9}, {"min_new_tokens": 3, "max_new_tokens": 9}),
        ({"stop_token_ids": [7, 8]}, {"stop_token_ids": (7, 8)}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
        ({"continue_final_message": True, "add_generation_prompt": False},
         {"continue_final_message": True, "add_generation_prompt": False}),
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}),
        ({"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"},
         {"chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "low"}}),
        ({"response_format": {"type": "json_object"}}, {"form": Form(schema='{"type": "object"}')}),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"title": "é"}}}},
         {"form": Form(schema='{"title": "é"}')}),
        ({"structured_outputs": {"json": {"type": "null"}, "regex": None}},
         {"form": Form(schema='{"type": "null"}')}),
        ({"structured_outputs": {"json": '{"type": "null"}'}}, {"form": Form(schema='{"type": "null"}')}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"form": Form(choices=("a", "b"))}),
        ({"structured_outputs": {"regex": "a+"}, "response_format": {"type": "text"}},
         {"form": Form(regex="a+")}),
        ({"structured_outputs": {}, "response_format": None}, {"form": None}),
    ],
)  # fmt: skip
def test_fields_are_what_the_engine_is_asked(
    url: str, backend: Backend, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    request = asked(url, backend, ask(**fields))
    assert {name: getattr(request, name) for name in expected} == expected


def test_a_client_sends_them_beside_its_own(client: openai.OpenAI, backend: Backend) -> None:
    extra = {"top_k": 4, "min_tokens": 2, "chat_template_kwargs": {"a": [1]}}
    client.chat.completions.create(**ask(presence_penalty=0.5), extra_body=extra)
    request = backend.requests[-1]
    assert (request.top_k, request.min_new_tokens, request.presence_penalty) == (4, 2, 0.5)
    assert request.chat_template_kwargs == {"a": [1]}


REFUSED: dict[str, Any] = {
    "guided_json": {"type": "object"}, "guided_regex": "a+", "guided_choice": ["a"], "guided_grammar": "x",
    "structured_outputs": {"grammar": "a"}, "regex": "a",
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "functions": [{"name": "f"}], "prompt_logprobs": 1, "logprob_token_ids": [1],
    "logit_bias": {"5": 1}, "bad_words": ["a"], "allowed_token_ids": [1], "best_of": 2,
    "use_beam_search": True, "length_penalty": 2.0, "early_stopping": True, "chat_template": "{{ x }}",
    "mm_processor_kwargs": {"max_pixels": 5}, "truncate_prompt_tokens": -1, "echo": True,
    "add_special_tokens": True, "skip_special_tokens": False, "spaces_between_special_tokens": False,
    "include_stop_str_in_output": True, "documents": [{"text": "a"}], "return_token_ids": True,
    "modalities": ["text", "audio"], "audio": {"voice": "a"}, "web_search_options": {}, "typical_p": 0.5,
    "verbosity": "low", "vllm_xargs": {"a": 1}, "repetition_detection": {"max_pattern_size": 3},
    "max_new_tokens": 5, "stop_sequences": ["a"], "system": "Be brief.", "thinking_token_budget": 5,
    "n": 2, "media_io_kwargs": {"image": {}}, "do_sample": True, "logits_processors": ["x"],
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_heeded_is_refused_by_name(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.BadRequestError, match=name) as refused:
        client.chat.completions.create(**ask(), extra_body={name: REFUSED[name]})
    assert refused.value.param == name


HARMLESS: dict[str, Any] = {
    **dict.fromkeys(REFUSED), "tool_choice": "auto", "logprobs": False, "n": 1, "best_of": 1, "echo": False,
    "response_format": {"type": "text"}, "length_penalty": 1.0, "skip_special_tokens": True, "tools": [],
    "stop": [], "stop_token_ids": [], "logit_bias": {}, "parallel_tool_calls": True, "user": "me",
    "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "prediction": None, "priority": 0,
    "cache_salt": "x", "request_id": "y", "something_new": [1], "stream": False, "stream_options": None,
}  # fmt: skip


def test_what_changes_nothing_is_taken(url: str, backend: Backend) -> None:
    plain = asked(url, backend, ask(seed=1))
    assert asked(url, backend, ask(seed=1, **HARMLESS)) == plain


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"top_k": -2}, "top_k", "greater than or equal to -1, got -2"),
        ({"logprobs": 5}, "logprobs", "boolean, unable to interpret input, got 5"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20, got 21"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "greater than or equal to 0, got -1"),
        ({"top_logprobs": 2}, "top_logprobs", "is 2, and needs logprobs: true"),
        ({"logprobs": False, "top_logprobs": 2}, "top_logprobs", "is 2, and needs logprobs: true"),
        ({"min_p": 2}, "min_p", "less than or equal to 1, got 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
        ({"min_tokens": 10, "max_tokens": 5}, "min_tokens", "min_tokens is 10; max_tokens is 5"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0]", "integer"),
        ({"repetition_penalty": 1e300}, "repetition_penalty", "less than or equal to 100"),
        ({"stop_token_ids": [10**30]}, "stop_token_ids[0]", "too large"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "got -1"),
        ({"stop": [1]}, "stop", "a text, or a list of texts"),
        ({"stop": ["a", ""]}, "stop", "empty"),
        ({"continue_final_message": True}, "continue_final_message", "add_generation_prompt"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "tokenize"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs", "bos_token"),
        ({"chat_template_kwargs": {"a": "x" * 20_000}}, "chat_template_kwargs", "longer than"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs", "an object, got a list"),
        ({"max_tokens": 10**400}, "max_tokens", ""),
        ({"response_format": {"type": "grammar"}}, "response_format.type", "'json_schema', got 'grammar'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "and no json_schema"),
        ({"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "response_format", "has type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "is missing",
        ),
        ({"response_format": "json"}, "response_format", "an object"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice[0]", "at least 1"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "is no JSON"),
        ({"structured_outputs": {"choice": ["a"], "regex": "a"}}, "structured_outputs", "several forms"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "is one form of the answer",
        ),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 1}, "min_tokens", "goes on where the form"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tool_choice": "any", "tools": []}, "tool_choice", "is 'any'; expected none, auto, required"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "match"),
        ({"temperature": 3}, "temperature", "should be less than or equal to 2, got 3"),
    ],
)
def test_values_out_of_range_are_named(url: str, fields: dict[str, Any], param: str, words: str) -> None:
    status, answer, _ = post(url, ask(**fields))
    assert (status, answer["error"]["param"]) == (400, param)
    assert answer["error"]["message"].startswith(param)
    assert words in answer["error"]["message"]


def part(kind: str, **fields: Any) -> dict[str, Any]:
    return user([TEXT, {"type": kind, **fields}])


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
URL = {"url": data_uri(png())}
PLACE = "messages[0].content[1]"
CONTENT = "messages[0].content"
NOT_TAKEN: dict[str, tuple[dict[str, Any], str, str]] = {
    "image_url as a string": (part("image_url", image_url="data:,"), f"{PLACE}.image_url", "an object: {"),
    "image_url null": (part("image_url", image_url=None), f"{PLACE}.image_url", "null"),
    "image_url missing": (part("image_url"), f"{PLACE}.image_url", "is missing"),
    "no url": (part("image_url", image_url={}), f"{PLACE}.image_url.url", "is missing"),
    "an empty url": (part("image_url", image_url={"url": ""}), f"{PLACE}.image_url.url", "at least 1"),
    "unknown detail": (
        part("image_url", image_url={**URL, "detail": "hi"}), f"{PLACE}.image_url.detail", "'low'",
    ),
    "input_image": (part("input_image", image_url="x"), PLACE, "Responses API"),
    "input_text": (part("input_text", text="x"), PLACE, "Responses API"),
    "image": (part("image", image="x"), PLACE, "image_url"),
    "video_url": (part("video_url", video_url={"url": "x"}), PLACE, "type 'video_url', which is not"),
    "input_audio": (part("input_audio", input_audio={}), PLACE, "text or image_url"),
    "file": (part("file", file={}), PLACE, "type 'file'"),
    "a type that is no text": (part(7), PLACE, "type 7"),  # type: ignore[arg-type]
    "a part without type": (user([TEXT, {"text": "x"}]), PLACE, "has no type"),
    "a part that is a text": (user([TEXT, "x"]), PLACE, "is 'x'; expected an object"),
    "text null": (part("text", text=None), f"{PLACE}.text", "got null"),
    "text a number": (part("text", text=5), f"{PLACE}.text", "a string, got 5"),
    "role": (says("function", "x"), "messages[0].role", "'tool', got 'function'"),
    "no role": ({"model": MODEL, "messages": [{"content": "x"}]}, "messages[0].role", "is missing"),
    "content a number": (user(3), CONTENT, "is 3; expected a text, or a list of parts"),
    "content an object": (user({"text": "x"}), CONTENT, "is an object; expected a text"),
    "content null": (user(None), CONTENT, "only an assistant"),
    "content an empty list": (user([]), CONTENT, "empty list"),
    "an image of the system": (says("system", [IMAGE]), "messages[0]", "of role system and holds an image"),
    "an image of the assistant": (says("assistant", [IMAGE]), "messages[0]", "role assistant"),
    "a message that is a text": ({"model": MODEL, "messages": ["x"]}, "messages[0]", "got 'x'"),
    "messages a text": ({"model": MODEL, "messages": "x"}, "messages", "a list, got 'x'"),
    "no messages": ({"model": MODEL}, "messages", "messages is missing"),
    "0 messages": ({"model": MODEL, "messages": []}, "messages", "at least 1"),
    "model a number": ({**user("x"), "model": 5}, "model", "model should be a string, got 5"),
    "tool_calls": (
        {"model": MODEL, "messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]},
        "messages[0]", "has tool_calls; only assistant messages may",
    ),
    "a local path": (part("image_url", image_url={"url": "a.png"}), f"{PLACE}.image_url", "data URI"),
    "no image": (part("image_url", image_url={"url": "data:,x"}), f"{PLACE}.image_url", "cannot read"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_a_part_that_is_not_taken_is_named_with_what_is(url: str, name: str) -> None:
    body, param, words = NOT_TAKEN[name]
    status, answer, _ = post(url, body)
    error = answer["error"]
    assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert error["message"].startswith(param)
    assert words in error["message"]
    assert "function-after" not in error["message"]
    assert "<" not in error["message"]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None}, {"role": "assistant"}, {"role": "assistant", "content": ""},
        {"role": "assistant", "content": None, "tool_calls": None, "function_call": None, "refusal": None},
        {"role": "assistant", "content": "3", "tool_calls": [], "name": "a", "reasoning_content": "x"},
        {"role": "user", "content": "x", "name": "me"}, {"role": "user", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": ""}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {**URL, "detail": None}}]},
        {"role": "system", "content": "Say hello."}, {"role": "developer", "content": "Say hello."},
    ],
    ids=str,
)  # fmt: skip
def test_messages_are_taken_as_openai_takes_them(url: str, backend: Backend, message: dict[str, Any]) -> None:
    asked(url, backend, {"model": MODEL, "messages": [message]})
    request = asked(url, backend, {"model": MODEL, "messages": [message, *ask()["messages"]]})
    text = message.get("content") if isinstance(message.get("content"), str) else ""
    assert [turn["role"] for turn in request.messages][-1] == "user"
    if not request.images:
        assert request.messages[0]["content"] == [{"type": "text", "text": text}]


def test_variables_of_the_option_hold_unless_a_request_sets_them() -> None:
    backend = Backend()
    with serving(backend, chat_template_kwargs={"enable_thinking": False, "n": 1}) as (url, _):
        request = asked(url, backend, {**user("Why?"), "chat_template_kwargs": {"n": 2}})
        assert request.chat_template_kwargs == {"enable_thinking": False, "n": 2}
        assert asked(url, backend, user("Why?")).chat_template_kwargs == {"enable_thinking": False, "n": 1}


def test_several_images_are_asked_in_their_places(url: str, backend: Backend) -> None:
    other = {"type": "image_url", "image_url": {"url": data_uri(png(colour="blue"))}}
    request = asked(url, backend, user([IMAGE, TEXT, other]))
    assert [part["type"] for part in request.messages[0]["content"]] == ["image", "text", "image"]
    assert request.images == [png(), png(colour="blue")]
