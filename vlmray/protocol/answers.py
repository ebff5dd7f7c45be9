"""What clients get: whole answers, chunks of streams, lists of models, errors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from vlmray.protocol.logprobs import ChoiceLogprobs
from vlmray.protocol.tools import Called, ToolCall, read_call
from vlmray.schema import TokenLogprob


class Usage(BaseModel):
    """Tokens of a request and its answer, visual ones included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, num_prompt_tokens: int, num_completion_tokens: int) -> Usage:
        """Add them up."""
        return cls(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=num_completion_tokens,
            total_tokens=num_prompt_tokens + num_completion_tokens,
        )


class AnswerMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class Choice(BaseModel):
    """The answer; there is one."""

    index: Literal[0] = 0
    message: AnswerMessage
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: ChoiceLogprobs | None = None

    @classmethod
    def of(
        cls,
        completion_id: str,
        text: str,
        *,
        is_cut: bool,
        is_call: bool,
        logprobs: Sequence[TokenLogprob] | None = None,
    ) -> Choice:
        """Read an answer, which may have to be a call.

        Args:
            completion_id: What the answer is known by, and its call.
            text: What the model wrote.
            is_cut: Whether it had to stop.
            is_call: Whether it had to call a function.
            logprobs: How likely its tokens were, where that was asked for.
        """
        told = None if logprobs is None else ChoiceLogprobs.of(logprobs)
        call = read_call(text, is_all=True) if is_call else None
        if call is None:
            return cls(
                message=AnswerMessage(content=text),
                finish_reason="length" if is_cut else "stop",
                logprobs=told,
            )
        called = ToolCall(id=call_id(completion_id), function=Called(**call._asdict()))
        return cls(
            message=AnswerMessage(content=None, tool_calls=[called]),
            finish_reason="length" if is_cut else "tool_calls",
            logprobs=told,
        )


def call_id(completion_id: str) -> str:
    """Return what the call of an answer is known by."""
    return completion_id.replace("chatcmpl-", "call_")


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ModelCard(BaseModel):
    """One model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vlmray"
    root: str | None = Field(default=None, description="what it was loaded from")
    parent: str | None = Field(default=None, description="of an adapter, its base")
    max_model_len: int | None = Field(
        default=None, description="most tokens of a prompt and its answer; null: not known, or not yet"
    )


class ModelList(BaseModel):
    """All models that can be asked."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """What was wrong with a request."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


class Chunks:
    """Makes the chunks of one streamed answer."""

    def __init__(self, completion_id: str, model: str) -> None:
        self._head = {
            "id": completion_id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }

    def delta(
        self, finish_reason: str | None = None, logprobs: Sequence[TokenLogprob] = (), **delta: Any
    ) -> dict[str, Any]:
        """A piece of the answer, or its end."""
        told = ChoiceLogprobs.of(logprobs).model_dump() if logprobs else None
        choice = {"index": 0, "delta": delta, "logprobs": told, "finish_reason": finish_reason}
        return {**self._head, "choices": [choice]}

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The chunk after the last, without an answer."""
        return {**self._head, "choices": [], "usage": usage.model_dump()}
