"""What clients send: the body of `POST /v1/chat/completions`, checked, and as an engine reads it.

body -> read_request -> ChatRequest -> image_sources, to_messages, sampling -> GenerationRequest
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from vlmray.protocol.errors import ApiError
from vlmray.protocol.fields import find_unsupported
from vlmray.protocol.forms import ResponseFormat, StructuredOutputs
from vlmray.protocol.logprobs import WantedLogprobs
from vlmray.protocol.templates import is_taken
from vlmray.protocol.tools import Function, Tool, ToolCall, ToolChoice, call_form, forced_functions
from vlmray.protocol.words import MARK, describe, explain
from vlmray.schema import Form

MAX_STOP_TEXTS = 16
MAX_STOP_TOKENS = 128
MAX_TEMPLATE_CHARS = 10_000
"""Of `chat_template_kwargs`, written as JSON."""

_OTHER_PARTS = {
    "input_text": 'is of the Responses API; here it is {"type": "text", "text": "..."}',
    "input_image": 'is of the Responses API; here it is {"type": "image_url", "image_url": {"url": "..."}}',
    "video_url": "is not supported: it is a video; send its frames as images",
    "input_video": "is not supported: it is a video; send its frames as images",
    "video": "is not supported: it is a video; send its frames as images",
    "image": 'is not known; write {"type": "image_url", "image_url": {"url": "..."}}',
}

Finite = Annotated[float, Field(allow_inf_nan=False)]


def _check_part(part: Any) -> Any:
    """Refuse a part of a kind that is not taken, before its fields are looked at."""
    expected = "expected an object with type text or image_url"
    if not isinstance(part, dict):
        raise ValueError(f"is {describe(part)}; {expected}")
    if "type" not in part:
        raise ValueError(f"has no type; {expected}")
    kind = part["type"]
    if kind not in ("text", "image_url"):
        known = _OTHER_PARTS.get(kind) if isinstance(kind, str) else None
        raise ValueError(f"has type {describe(kind)}, which {known or f'is not supported; {expected}'}")
    return part


def _check_image_url(value: Any) -> Any:
    if isinstance(value, dict):
        return value
    raise ValueError(
        f'is {describe(value)}; expected an object: {{"url": "data:image/png;base64,... or https://..."}}'
    )


def _check_content(value: Any, info: ValidationInfo) -> Any:
    if value is None and info.data.get("role") != "assistant":
        raise ValueError("is missing or null, which only an assistant message may have")
    if value == []:
        raise ValueError("is an empty list; expected a text, or at least one part")
    if value is None or isinstance(value, str | list):
        return value
    raise ValueError(f"is {describe(value)}; expected a text, or a list of parts")


def _is_deep(value: Any, levels: int = 32) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not levels or any(_is_deep(child, levels - 1) for child in children)


class ImageURL(BaseModel):
    """Where an image is."""

    url: str = Field(min_length=1, description="data URI, or http(s) URL")
    detail: Literal["auto", "low", "high"] | None = Field(
        default=None, description="accepted, without effect"
    )


class TextPart(BaseModel):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImagePart(BaseModel):
    """An image."""

    type: Literal["image_url"]
    image_url: Annotated[ImageURL, BeforeValidator(_check_image_url)]


Part = Annotated[
    Annotated[TextPart, Tag(f"{MARK}text")] | Annotated[ImagePart, Tag(f"{MARK}image")],
    Discriminator(lambda part: f"{MARK}text" if part["type"] == "text" else f"{MARK}image"),
    BeforeValidator(_check_part),
]

Content = Annotated[
    Annotated[str, Tag(f"{MARK}text")]
    | Annotated[list[Part], Tag(f"{MARK}parts")]
    | Annotated[None, Tag(f"{MARK}none")],
    Discriminator(lambda value: MARK + {str: "text", list: "parts"}.get(type(value), "none")),
    BeforeValidator(_check_content),
]


class Message(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = Field(default=None, validate_default=True)
    tool_calls: list[ToolCall] | None = Field(default=None, description="of an assistant message")
    tool_call_id: str | None = Field(default=None, description="of a tool message: the call that it answers")

    @model_validator(mode="after")
    def _check(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"is of role {self.role} and has tool_calls; only assistant messages may")
        for name in ("function_call", "audio", "refusal", "prefix"):
            if (self.model_extra or {}).get(name):
                hint = "; use continue_final_message" if name == "prefix" else ""
                raise ValueError(f"has {name}, which is not supported{hint}")
        if self.role != "user" and any(isinstance(part, ImagePart) for part in self.parts):
            raise ValueError(f"is of role {self.role} and holds an image; only user messages may")
        return self

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """The content, in parts whatever it was written as."""
        if isinstance(self.content, list):
            return self.content
        return [TextPart(type="text", text=self.content or "")]


class StreamOptions(BaseModel):
    """What a stream ends with."""

    include_usage: bool | None = None


class ChatRequest(WantedLogprobs):
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

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, description="older name of max_completion_tokens")
    max_completion_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int | None = Field(default=None, ge=0, description="the answer does not end before")
    temperature: Finite | None = Field(default=None, ge=0, le=2, description="default 0: greedy")
    top_p: Finite | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, description="-1 or 0: all tokens")
    min_p: Finite | None = Field(default=None, ge=0, le=1)
    repetition_penalty: Finite | None = Field(
        default=None, ge=0.01, le=100, description="default: the model's own"
    )
    presence_penalty: Finite | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: Finite | None = Field(default=None, ge=-2, le=2)
    stop: str | list[str] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(
        default=None, max_length=MAX_STOP_TOKENS
    )
    ignore_eos: bool | None = Field(default=None, description="go on where the model would end")
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: Literal[1] | None = None
    tools: list[Tool] | None = Field(default=None, description="functions that may be called")
    tool_choice: ToolChoice = Field(
        default=None, description="required, or a function: the answer calls one; none: it does not"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_generation_prompt: bool | None = Field(default=None, description="default true")
    continue_final_message: bool | None = Field(
        default=None,
        description="the answer goes on with the last message; needs add_generation_prompt false",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="variables for the model's chat template"
    )
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="as vLLM has it: json, choice or regex"
    )
    reasoning_effort: str | None = Field(default=None, description="for chat templates that know it")

    @field_validator("stop", mode="before")
    @classmethod
    def _check_stop(cls, stop: Any) -> Any:
        texts = stop if isinstance(stop, list) else [stop]
        if not all(text is None or isinstance(text, str) for text in texts):
            raise ValueError("has to be a text, or a list of texts")
        if "" in texts:
            raise ValueError("has an empty text")
        if len(texts) > MAX_STOP_TEXTS:
            raise ValueError(f"has {len(texts)} texts; at most {MAX_STOP_TEXTS} are supported")
        return stop

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_template_kwargs(cls, found: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in found or {}:
            if is_taken(name):
                raise ValueError(f"has {name!r}, which is no variable of a chat template")
        if _is_deep(found):
            raise ValueError("is nested too deeply")
        if found and len(json.dumps(found)) > MAX_TEMPLATE_CHARS:
            raise ValueError(f"is longer than {MAX_TEMPLATE_CHARS} characters")
        return found

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer, under either of its names."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def forced_functions(self) -> list[Function]:
        """The functions of which the answer has to call one."""
        return forced_functions(self.tools or [], self.tool_choice)

    @property
    def form(self) -> Form | None:
        """What the answer has to be."""
        if self.forced_functions:
            return call_form(self.forced_functions)
        wanted = (self.response_format, self.structured_outputs)
        return next((each.form for each in wanted if each is not None and each.form is not None), None)

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """The variables for the chat template."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**effort, **(self.chat_template_kwargs or {})}


def read_request(body: dict[str, Any]) -> ChatRequest:
    """Make a request of a body, and refuse what would be answered otherwise than its client expects.

    Raises:
        ApiError: A field is missing, has a value that it cannot have, or cannot be heeded.
    """
    try:
        request = ChatRequest.model_validate(body)
    except ValidationError as error:
        message, path = explain(error.errors(include_url=False)[0])
        raise ApiError(400, message, param=path) from error
    unsupported = find_unsupported(request.model_extra or {})
    if unsupported:
        raise ApiError(400, unsupported[1], param=unsupported[0])
    _check_tools(request)
    _check_form(request)
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is for requests with stream", param="stream_options")
    if request.continue_final_message and request.add_generation_prompt is not False:
        raise ApiError(
            400, "continue_final_message needs add_generation_prompt: false", param="continue_final_message"
        )
    return request


def _check_tools(request: ChatRequest) -> None:
    """Refuse tools that a model would have to choose by itself, and a choice of none that there are."""
    choice = request.tool_choice
    if request.tools and choice in (None, "auto"):
        message = "tools is not supported with tool_choice auto; pass required, a function, or none"
        raise ApiError(400, message, param="tools")
    try:
        forced = request.forced_functions
    except ValueError as error:
        raise ApiError(400, f"tool_choice {error}", param="tool_choice") from error
    if choice == "required" and not forced:
        raise ApiError(400, "tool_choice is required, and there are no tools", param="tool_choice")


def _check_form(request: ChatRequest) -> None:
    """Refuse an answer of two forms, or of one that it cannot keep."""
    form = request.form
    for name in ("response_format", "structured_outputs"):
        other = getattr(request, name)
        if other is not None and other.form not in (None, form):
            message = f"{name} is one form of the answer, and another is asked for; an answer can have one"
            raise ApiError(400, message, param=name)
    for name in ("min_tokens", "ignore_eos"):
        if form is not None and getattr(request, name):
            raise ApiError(400, f"{name} goes on where the form of the answer lets it end", param=name)


def image_sources(request: ChatRequest) -> dict[str, str]:
    """Return the URLs of all images, in order, by their places in the request."""
    return {
        f"messages[{turn}].content[{place}].image_url": part.image_url.url
        for turn, message in enumerate(request.messages)
        for place, part in enumerate(message.parts)
        if isinstance(part, ImagePart)
    }


def count_chars(request: ChatRequest) -> int:
    """Return the length of all texts together."""
    parts = [part for message in request.messages for part in message.parts]
    return sum(len(part.text) for part in parts if isinstance(part, TextPart))


def to_messages(request: ChatRequest) -> list[dict[str, Any]]:
    """Return the conversation as chat templates here read it; images are placeholders."""
    return [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": [
                {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
                for part in message.parts
            ],
            **_calls(message),
        }
        for message in request.messages
    ]


def _calls(message: Message) -> dict[str, Any]:
    """Return the calls of a message, or what call it answers, as chat templates read them."""
    if message.role == "tool":
        return {"tool_call_id": message.tool_call_id or ""}
    calls = [
        {
            "id": call.id, "type": call.type,
            "function": {"name": call.function.name, "arguments": _read_arguments(call.function.arguments)},
        }
        for call in message.tool_calls or ()
    ]  # fmt: skip
    return {"tool_calls": calls} if calls else {}


def _read_arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # a call that was cut
        return text


def tools_of(request: ChatRequest) -> tuple[dict[str, Any], ...]:
    """Return the functions that the model is told of: those that it may call."""
    return tuple(
        {"type": "function", "function": each.model_dump(exclude_none=True, exclude={"strict"})}
        for each in request.forced_functions
    )


def sampling(request: ChatRequest) -> dict[str, Any]:
    """Return how the answer is drawn, as keywords of a `GenerationRequest`; what was not said is left out."""
    found = {
        "min_new_tokens": request.min_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k and max(0, request.top_k),
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "form": request.form,
        "num_logprobs": request.num_logprobs,
        "tools": tools_of(request) or None,
        "ignore_eos": request.ignore_eos,
        "add_generation_prompt": request.add_generation_prompt,
        "continue_final_message": request.continue_final_message,
    }
    return {name: value for name, value in found.items() if value is not None}
