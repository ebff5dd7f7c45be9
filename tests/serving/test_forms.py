"""Forms of answers over HTTP: what the official client parses, and functions that it has called."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from helpers.charts import dataset
from helpers.families.building import template_of_trl
from helpers.gateways import KEY, Backend, ask, data_uri, serving
from vlmray.engines import build_engine


class Part(BaseModel):
    label: str = Field(max_length=4)
    share: int = Field(ge=0, le=100)


class Chart(BaseModel):
    kind: Literal["bar", "line", "pie"]
    parts: list[Part] = Field(max_length=2)
    title: str | None = Field(max_length=5)


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    """A client of a gateway over the built-in model."""
    backend: Any = Backend()
    backend.engine = build_engine(engine="transformers", model_id="builtin")
    with serving(backend) as (url, _):
        yield openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    backend.engine.close()


def asked(**fields: Any) -> dict[str, Any]:
    row = dataset()[0]
    return ask(row["question"], data_uri(row["image"]), max_tokens=400, **fields)


def test_the_official_client_parses_a_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(**asked(), response_format=Chart)
    (choice,) = answer.choices
    assert isinstance(choice.message.parsed, Chart)
    assert choice.finish_reason == "stop"
    with client.chat.completions.stream(**asked(), response_format=Chart) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == choice.message.parsed


def test_an_answer_that_is_cut_is_not_parsed(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**asked() | {"max_tokens": 5}, response_format=Chart)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"choice": ["a long answer", "no answer"]}, ["a long answer", "no answer"]),
        ({"regex": "7{3}"}, ["777"]),
    ],
)
def test_forms_of_vllm_are_kept(client: openai.OpenAI, wanted: dict[str, Any], expected: list[str]) -> None:
    answer = client.chat.completions.create(**asked(), extra_body={"structured_outputs": wanted})
    assert answer.choices[0].message.content in expected


def test_a_schema_that_cannot_be_compiled_is_refused(client: openai.OpenAI) -> None:
    schema = {"name": "x", "schema": {"type": "array", "uniqueItems": True}}
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        client.chat.completions.create(
            **asked(), response_format={"type": "json_schema", "json_schema": schema}
        )  # type: ignore[call-overload]


DRAW = openai.pydantic_function_tool(Chart, name="draw", description="Draw a chart")
COUNT = {"type": "function", "function": {"name": "count", "parameters": Part.model_json_schema()}}
NAMED = {"type": "function", "function": {"name": "draw"}}


@pytest.mark.parametrize(("tools", "choice"), [([DRAW], "required"), ([DRAW, COUNT], NAMED)])
def test_a_function_is_called_with_what_it_takes(
    client: openai.OpenAI, tools: list[Any], choice: Any
) -> None:
    answer = client.chat.completions.parse(**asked(), tools=[DRAW], tool_choice=choice)
    (choice_,) = answer.choices
    assert (choice_.finish_reason, choice_.message.content) == ("tool_calls", None)
    (call,) = choice_.message.tool_calls or []
    assert call.function.name == "draw"
    assert isinstance(call.function.parsed_arguments, Chart)

    chunks = list(client.chat.completions.create(**asked(), tools=tools, tool_choice=choice, stream=True))
    deltas = [part.function for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
    assert [each.name for each in deltas if each.name] == ["draw"]
    assert "".join(each.arguments or "" for each in deltas) == call.function.arguments
    assert len(deltas) > 3
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_one_of_several_functions_is_called(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**asked(), tools=[COUNT, DRAW], tool_choice="required")
    (call,) = answer.choices[0].message.tool_calls or []
    kind = {"count": Part, "draw": Chart}[call.function.name]  # type: ignore[union-attr]
    assert kind.model_validate_json(call.function.arguments)  # type: ignore[union-attr]


def test_a_call_that_is_cut_says_so(client: openai.OpenAI) -> None:
    body = asked(tools=[DRAW], tool_choice="required")
    for limit in (3, 30):
        answer = client.chat.completions.create(**body | {"max_tokens": limit})
        assert answer.choices[0].finish_reason == "length"
        *_, last = client.chat.completions.create(**body | {"max_tokens": limit}, stream=True)
        assert last.choices[0].finish_reason == "length"


def test_calls_and_results_are_worded_as_text_where_the_template_knows_none(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {
        "id": "a",
        "type": "function",
        "function": {"name": "draw", "arguments": '{"kind": "<|im_end|>"}'},
    }
    messages = [
        *asked()["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "drawn"},
    ]
    body = asked() | {"messages": messages}
    assert client.chat.completions.create(**body).choices[0].message.content
    backend = Backend()
    with serving(backend) as (url, _):
        other = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY)
        other.chat.completions.create(**body, tools=[DRAW], tool_choice="required")
    (request,) = backend.requests
    assert request.messages[1]["tool_calls"][0]["function"]["arguments"] == {"kind": "<|im_end|>"}
    assert [tool["function"]["name"] for tool in request.tools] == ["draw"]
    engine = build_engine(engine="transformers", model_id="builtin")
    (completion,) = engine.generate([request])
    assert "These functions can be called" in completion.prompt
    assert '{"name": "draw", "arguments": {"kind": "<|im_end|>"}}' in completion.prompt
    assert "The function's result: drawn" in completion.prompt
    assert json.loads(completion.text)["name"] == "draw" if completion.finish_reason == "stop" else True
    engine.close()


def test_a_client_goes_on_behind_a_call_where_the_template_knows_tools() -> None:
    backend: Any = Backend()
    template = template_of_trl("qwen3_vl")
    backend.engine = build_engine(engine="transformers", model_id="builtin", chat_template=template)
    body = asked(tools=[DRAW], tool_choice="required")
    with serving(backend) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        said = client.chat.completions.create(**body).choices[0].message
        (call,) = said.tool_calls or []
        result = {"role": "tool", "tool_call_id": call.id, "content": "drawn"}
        messages = [*body["messages"], said.model_dump(exclude_none=True), result]
        again = client.chat.completions.create(**body | {"messages": messages})
    assert [each.function.name for each in again.choices[0].message.tool_calls or []] == ["draw"]
    first, second = (each.prompt for each in backend.engine.generate(backend.requests))
    backend.engine.close()
    arguments = json.dumps(json.loads(call.function.arguments), ensure_ascii=False)
    assert "# Tools" in first
    assert second == (
        f'{first}<tool_call>\n{{"name": "draw", "arguments": {arguments}}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\ndrawn\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
