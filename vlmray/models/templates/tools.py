"""Functions in a conversation, for chat templates that know of tools and for those that do not.

messages -> tell_plainly -> the same, as templates that know tools read them
messages, tools -> word_tools -> messages of system, user and assistant
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from vlmray.models.templates.chat import find_variables
from vlmray.schema import parts_of

_INTRODUCTION = (
    "These functions can be called:\n{functions}\n"
    'Call one by answering with its name and its arguments as JSON: {{"name": "...", "arguments": {{...}}}}'
)


@functools.lru_cache(maxsize=32)
def knows_tools(template: str) -> bool:
    """Tell whether a chat template words tools; one that only speaks of them does not."""
    return "tools" in find_variables(template)


class _Arguments(dict[str, Any]):
    """Those of a call: a mapping, and JSON where a template writes them as a text."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, text: str) -> str:
        return str(self) + text

    def __radd__(self, text: str) -> str:
        return text + str(self)


def tell_plainly(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return a conversation as templates that word tools read it: what is text alone as a text, not in parts.

    What they do beside tools comes from models of text: a list they may write as Python does, or take for an
    answer beside a call, though it is empty.
    """
    return [_plain(message) for message in messages]


def _plain(message: Mapping[str, Any]) -> Mapping[str, Any]:
    parts = parts_of(message) or []
    if any(part["type"] != "text" for part in parts):
        return message
    told = {**message, "content": "".join(part["text"] for part in parts)}
    if calls := message.get("tool_calls"):
        told["tool_calls"] = [{**call, "function": _readable(call["function"])} for call in calls]
    return told


def _readable(called: Mapping[str, Any]) -> Mapping[str, Any]:
    arguments = called["arguments"]
    return {**called, "arguments": _Arguments(arguments) if isinstance(arguments, Mapping) else arguments}


def word_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Return a conversation whose tools, calls and results are texts.

    >>> call = {"function": {"name": "f", "arguments": {"x": 1}}}
    >>> word_tools([{"role": "assistant", "content": [], "tool_calls": [call]}], [])
    [{'role': 'assistant', 'content': [{'type': 'text', 'text': '{"name": "f", "arguments": {"x": 1}}'}]}]
    """
    worded = [_word(message) for message in messages]
    if not tools:
        return worded
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    parts = [_text(_INTRODUCTION.format(functions=functions))]
    if worded and worded[0]["role"] == "system":
        first = worded.pop(0)
        parts = [*(parts_of(first) or ()), _text("\n\n"), *parts]
    return [{"role": "system", "content": parts}, *worded]


def _word(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = list(parts_of(message) or ())
    if message["role"] == "tool":
        return {"role": "user", "content": [_text("The function's result: "), *content]}
    calls = message.get("tool_calls")
    if not calls:
        return message
    said = [part for part in content if part.get("text")]
    written = [_text(json.dumps(call["function"], ensure_ascii=False)) for call in calls]
    return {"role": "assistant", "content": [*said, *written]}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
