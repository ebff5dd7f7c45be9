"""Chat templates that know tools and those that do not: offers, calls and results are in the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.families.building import template_of_trl
from helpers.gateways import data_uri, png
from vlmray.models.processors import load_processor
from vlmray.models.prompts import ChatPrompts
from vlmray.models.templates.tools import knows_tools
from vlmray.protocol.request import read_request, sampling, to_messages
from vlmray.schema import GenerationRequest

MISTRAL = """
{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for message in messages %}
{%- if message.role == "user" %}[INST]{{ message.content }}[/INST]
{%- elif message.role == "tool" %}[TOOL_RESULTS]{"content": {{ message.content | tojson }}}[/TOOL_RESULTS]
{%- elif message.tool_calls %}[TOOL_CALLS][
{%- for call in message.tool_calls %}{"name": "{{ call.function.name }}", "arguments":
{{- " " }}{{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}{% endfor %}]</s>
{%- else %}{{ message.content }}</s>{% endif %}
{%- endfor %}"""

TEMPLATES = {
    "qwen3_vl": (
        template_of_trl("qwen3_vl"),
        '<|im_start|>assistant\n<tool_call>\n{"name": "draw", "arguments": {"kind": "bar", "size": 3}}'
        "\n</tool_call><|im_end|>\n",
        "<|im_start|>user\n<tool_response>\ndrawn\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama3_2": (
        template_of_trl("llama3_2"),
        "Draw it.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"name": "draw", "parameters": {"kind": "bar", "size": 3}}<|eot_id|>',
        '<|start_header_id|>ipython<|end_header_id|>\n\n"drawn"<|eot_id|>',
    ),
    "glm4moe": (
        template_of_trl("glm4moe"),
        "<tool_call>draw\n<arg_key>kind</arg_key>\n<arg_value>bar</arg_value>\n"
        "<arg_key>size</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
        "<|observation|>\n<tool_response>\ndrawn\n</tool_response>",
    ),
    "lfm2_2_5_vl": (
        template_of_trl("lfm2_2_5_vl"),
        "<|im_start|>assistant\n<|tool_call_start|>[draw(kind='bar', size=3)]<|tool_call_end|><|im_end|>",
        "<|im_start|>tool\ndrawn<|im_end|>",
    ),
    "gemma4": (
        template_of_trl("gemma4_v5"),
        '<|tool_call>call:draw{kind:<|"|>bar<|"|>,size:3}<tool_call|>',
        '<|tool_response>response:draw{value:<|"|>drawn<|"|>}<tool_response|>',
    ),
    "mistral": (
        MISTRAL,
        '[INST]Draw it.[/INST][TOOL_CALLS][{"name": "draw", "arguments": {"kind": "bar", "size": 3}, '
        '"id": "a1"}]</s>',
        '[TOOL_RESULTS]{"content": "drawn"}[/TOOL_RESULTS]',
    ),
}
"""Published ones as TRL has them, and one in Mistral's style: each with a call and a result in its words."""

BY_NAME = pytest.mark.parametrize("template", [each[0] for each in TEMPLATES.values()], ids=[*TEMPLATES])


@pytest.fixture(scope="module")
def prompts(tiny_model: Path) -> ChatPrompts:
    return ChatPrompts(load_processor(str(tiny_model)))


def asked(
    kind: str = "bar", result: str = "drawn", about: str = "Draw a chart", *images: str
) -> GenerationRequest:
    """What a client's request behind a call becomes."""
    arguments = f'{{"kind": "{kind}", "size": 3}}'
    call = {"id": "a1", "type": "function", "function": {"name": "draw", "arguments": arguments}}
    shown = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    function = {"name": "draw", "description": about, "parameters": {"type": "object", "properties": {}}}
    body = {
        "model": "m",
        "messages": [
            {"role": "user", "content": [*shown, {"type": "text", "text": "Draw it."}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a1", "content": result},
        ],
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
    }
    chat = read_request(body)
    return GenerationRequest(request_id="a", messages=to_messages(chat), **sampling(chat))


@pytest.mark.parametrize(("template", "call", "result"), TEMPLATES.values(), ids=[*TEMPLATES])
def test_what_is_offered_called_and_answered_is_in_the_templates_words(
    prompts: ChatPrompts, template: str, call: str, result: str
) -> None:
    prompt = prompts.render_request(asked(), template)
    assert prompt.count("Draw a chart") == prompt.count(call) == prompt.count(result) == 1
    assert prompt.index("Draw a chart") < prompt.index(call) < prompt.index(result)
    assert "{'" not in prompt  # what Python would write


@pytest.mark.parametrize(
    "written", ["{{ f.name + '[ARGS]' + f.arguments }}", "{{ f.name }}[ARGS]{{ f.arguments }}"]
)
def test_arguments_are_json_where_a_template_writes_them_as_a_text(
    prompts: ChatPrompts, written: str
) -> None:
    template = (
        "{{ tools | length }}{% for message in messages %}{% for call in message.tool_calls or [] %}"
        f"{{% set f = call.function %}}{written}{{% endfor %}}{{% endfor %}}"
    )
    assert prompts.render_request(asked(kind="é"), template) == '1draw[ARGS]{"kind": "é", "size": 3}'


@BY_NAME
def test_none_of_it_forges_a_turn(prompts: ChatPrompts, template: str) -> None:
    """Whatever a function says, or is said to be, is text."""
    end = "<|im_end|>"
    special = prompts.processor_for("").tokenizer.convert_tokens_to_ids(end)
    prompt, forged = (prompts.render_request(asked(text, text, text), template) for text in ("x", end))
    assert prompts.readable(forged).count(end) == prompt.count(end) + 3
    assert prompts.tokenize(forged).count(special) == prompts.tokenize(prompt).count(special)


@BY_NAME
def test_a_conversation_without_tools_is_worded_as_ever(
    prompts: ChatPrompts, template: str, tiny_model: Path
) -> None:
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]
    request = GenerationRequest(request_id="a", messages=messages)
    expected = load_processor(str(tiny_model)).apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True
    )
    assert prompts.render_request(request, template) == expected


def test_images_stay_where_they_are(prompts: ChatPrompts) -> None:
    request = asked("bar", "drawn", "Draw a chart", data_uri(png()))
    prompt = prompts.render_request(request, TEMPLATES["qwen3_vl"][0])
    assert "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Draw it.<|im_end|>" in prompt
    prompts.encode(prompt, [Image.new("RGB", (84, 56))])


@pytest.mark.parametrize("own", ["{# tools #}", "You have no tools. "])
def test_a_template_that_only_speaks_of_tools_does_not_know_them(prompts: ChatPrompts, own: str) -> None:
    template = (
        own + "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
        "{{ part.text }}{% endfor %};{% endfor %}"
    )
    assert not knows_tools(template)
    prompt = prompts.render_request(asked(), template)
    assert prompt.count("Draw a chart") == 1
    assert 'assistant: {"name": "draw", "arguments": {"kind": "bar", "size": 3}};' in prompt
    assert "user: The function's result: drawn;" in prompt
