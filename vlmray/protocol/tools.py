"""Functions that the answer has to call: what clients offer, and what they get.

tools, tool_choice -> call_form -> answer: {"name": ..., "arguments": ...} -> read_call -> ToolCall

One function is called, and it always is: a model that decides itself does so in a format of its own, which is
not read here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, Field

from vlmray.protocol.words import describe
from vlmray.schema import Form

_HEAD = re.compile(r'\{\s*"name":\s*"([^"]*)",\s*"arguments":\s*')
_CHOICES = ("none", "auto", "required")


class Function(BaseModel):
    """What may be called."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="JSON schema of its arguments")
    strict: bool | None = Field(default=None, description="arguments keep the schema in any case")


class Tool(BaseModel):
    """A function, as it is offered."""

    type: Literal["function"]
    function: Function


class Called(BaseModel):
    """A function, as it is called."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call in a conversation."""

    id: str = ""
    type: Literal["function"] = "function"
    function: Called


def _check_choice(choice: Any) -> Any:
    if choice is None or choice in _CHOICES:
        return choice
    named = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(named, dict) or not isinstance(named.get("name"), str):
        expected = 'none, auto, required or {"type": "function", "function": {"name": "..."}}'
        raise ValueError(f"is {describe(choice)}; expected {expected}")
    return choice


ToolChoice = Annotated[Any, BeforeValidator(_check_choice)]


def forced_functions(tools: Sequence[Tool], choice: Any) -> list[Function]:
    """Return the functions of which the answer has to call one; none where it need not.

    Raises:
        ValueError: The named one is not among them.
    """
    functions = [tool.function for tool in tools]
    if not isinstance(choice, dict):
        return functions if choice == "required" else []
    name = choice["function"]["name"]
    found = [function for function in functions if function.name == name]
    if not found:
        known = ", ".join(function.name for function in functions) or "none"
        raise ValueError(f"names the function {name[:80]!r}, which is not in tools; known: {known}")
    return found[:1]


def call_form(functions: Sequence[Function]) -> Form:
    """Return the form of a call of one of some functions."""
    schemas = {
        each.name: _moved({"type": "object", **(each.parameters or {})}, f"#/$defs/{each.name}")
        for each in functions
    }
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{name}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name in schemas
    ]
    return Form(schema=json.dumps({"anyOf": calls, "$defs": schemas}, ensure_ascii=False))


def _moved(schema: Any, place: str) -> Any:
    """Return a schema whose references hold where it is a part of another."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(value, place) for name, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved


class Call(NamedTuple):
    """A call as far as it is written."""

    name: str
    arguments: str


def read_call(text: str, *, is_all: bool) -> Call | None:
    """Read a call, as far as it is settled; None before its arguments begin.

    >>> read_call('{"name": "f", "arguments": {"x": {}}}', is_all=True)
    Call(name='f', arguments='{"x": {}}')
    >>> read_call('{"name": "f", "arguments": {"x": {}}', is_all=False)
    Call(name='f', arguments='{"x": {')
    >>> read_call('{"name": "f', is_all=True)

    Args:
        text: The answer so far.
        is_all: Whether no more comes.
    """
    head = _HEAD.match(text)
    if head is None:
        return None
    arguments = text[head.end() :]
    if not is_all:  # which of the braces at the end is the last is not known yet
        return Call(head[1], arguments.rstrip("} \n\t"))
    try:
        json.loads(text)
    except ValueError:
        return Call(head[1], arguments)  # it was cut
    return Call(head[1], arguments.rstrip()[:-1].rstrip())


class CallStream:
    """A call on its way to a client, in the deltas of OpenAI's streams.

    Args:
        call_id: What the call is known by.
    """

    def __init__(self, call_id: str) -> None:
        self._id = call_id
        self._text = self._sent = ""
        self._begun = False

    def push(self, piece: str) -> dict[str, Any] | None:
        """Take the next piece of the answer; return what of the call is new."""
        self._text += piece
        return self._delta(read_call(self._text, is_all=False))

    def end(self, text: str) -> dict[str, Any] | None:
        """Take the whole answer; return what of the call is new, or the text where it was cut before one."""
        return self._delta(read_call(text, is_all=True)) or ({} if self._begun else {"content": text})

    def _delta(self, call: Call | None) -> dict[str, Any] | None:
        if call is None:
            return None
        new = call.arguments[len(self._sent) :]
        self._sent = call.arguments
        function = {"arguments": new}
        about: dict[str, Any] = {"index": 0, "function": function}
        if not self._begun:
            self._begun = True
            about |= {"id": self._id, "type": "function", "function": {"name": call.name, **function}}
        elif not new:
            return None
        return {"tool_calls": [about]}
