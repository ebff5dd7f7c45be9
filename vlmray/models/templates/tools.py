"""Functions in a conversation, for chat templates that know of none: in plain text.

messages, tools -> word_tools -> messages of system, user and assistant
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlmray.schema import parts_of

_INTRODUCTION = (
    "These functions can be called:\n{functions}\n"
    'Call one by answering with its name and its arguments as JSON: {{"name": "...", "arguments": {{...}}}}'
)


def knows_tools(template: str) -> bool:
    """Tell whether a chat template words tools."""
    return re.search(r"\btools\b", template) is not None


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
