"""The part of OpenAI's chat protocol that is spoken here: what clients send and what they get.

    ChatRequest -> check_supported, to_messages -> GenerationRequest -> Completion -> ChatCompletion | chunks

Fields that would change an answer and are not supported are refused, not ignored. Unknown ones are ignored:
clients send more and more of them.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MAX_STOP_TEXTS = 16


def _check_text(text: str) -> str:
    """JSON can hold halves of characters, which are no text and cannot be sent back."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half a surrogate pair is no character")
    return text


Text = Annotated[str, AfterValidator(_check_text)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class ImageURL(BaseModel):
    """Where an image is."""

    url: Text = Field(min_length=1, description="data URI, or http(s) URL")
    detail: Literal["auto", "low", "high"] = Field(default="auto", description="accepted, without effect")


class TextPart(BaseModel):
    """A piece of text."""

    type: Literal["text"]
    text: Text


class ImagePart(BaseModel):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageURL


class Message(BaseModel):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class StreamOptions(BaseModel):
    """What a stream ends with."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of `POST /v1/chat/completions`."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "example": {
                "model": "builtin",
                "messages": [{"role": "user", "content": "How many bars are there?"}],
            }
        },
    )

    model: Text
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, description="older name of max_completion_tokens")
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: Finite | None = Field(default=None, ge=0, le=2, description="default 0: greedy")
    top_p: Finite | None = Field(default=None, gt=0, le=1)
    stop: Text | list[Text] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer, under either of its names."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


_HARMLESS: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "modalities": (None, ["text"]),
    "audio": (None,),
}
"""Fields that are not supported, and the values at which that makes no difference."""


def check_supported(request: ChatRequest) -> None:
    """Refuse what would be answered otherwise than the client expects.

    Raises:
        ValueError: A field that is not supported, too many or empty stop texts, images where they have no
            place, or a conversation that asks nothing.
    """
    for name, value in (request.model_extra or {}).items():
        if name in _HARMLESS and value not in _HARMLESS[name]:
            raise ValueError(f"{name} is not supported")
    if len(request.stop_texts) > MAX_STOP_TEXTS:
        raise ValueError(f"{len(request.stop_texts)} stop texts; at most {MAX_STOP_TEXTS} are supported")
    if "" in request.stop_texts:
        raise ValueError("a stop text is empty")
    if request.stream_options is not None and not request.stream:
        raise ValueError("stream_options is for requests with stream")
    for message in request.messages:
        if message.role != "user" and any(isinstance(part, ImagePart) for part in message.content):
            raise ValueError(f"a {message.role} message holds an image; only user messages may")
    if not any(message.content for message in request.messages if message.role == "user"):
        raise ValueError("no user message has content")


def image_sources(request: ChatRequest) -> list[str]:
    """Return the URLs of all images, in order."""
    return [
        part.image_url.url
        for message in request.messages
        for part in message.content
        if isinstance(part, ImagePart)
    ]


def count_chars(request: ChatRequest) -> int:
    """Return the length of all texts together."""
    contents = [message.content for message in request.messages]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    texts = [content for content in contents if isinstance(content, str)]
    return sum(map(len, texts)) + sum(len(part.text) for part in parts if isinstance(part, TextPart))


def to_messages(request: ChatRequest) -> list[dict[str, Any]]:
    """Return the conversation as chat templates here read it; images are placeholders."""
    messages = []
    for message in request.messages:
        content = message.content
        parts = [TextPart(type="text", text=content)] if isinstance(content, str) else content
        messages.append(
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": [
                    {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
                    for part in parts
                ],
            }
        )
    return messages


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
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The answer; there is one."""

    index: Literal[0] = 0
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


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
    parent: str | None = Field(default=None, description="of an adapter, its base")


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

    def delta(self, finish_reason: str | None = None, **delta: str) -> dict[str, Any]:
        """A piece of the answer, or its end."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "choices": [choice]}

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The chunk after the last, without an answer."""
        return {**self._head, "choices": [], "usage": usage.model_dump()}
