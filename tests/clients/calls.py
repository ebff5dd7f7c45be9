"""Calls of clients for Python, each in the client's own terms; run in the environment of `make clients`.

    python calls.py CLIENT '{"base_url": ..., "model": ..., "image": ..., "question": ..., "answer": ...}'

prints a line for each call: its name, and "ok" or what went wrong.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

KEY = "secret"
LONG = "word " * 20_000

given = SimpleNamespace(**json.loads(sys.argv[2]))
PICTURE = Path(given.image).read_bytes()
DATA_URI = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"
TURNS = [
    {"role": "system", "content": "Answer with one word."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": DATA_URI, "detail": "high"}},
            {"type": "text", "text": given.question},
        ],
    },
]
ASKED = TURNS[-1:]
Calls = dict[str, Callable[[], object]]


def raises(kind: type[Exception], call: Callable[[], object], *words: str) -> None:
    """A call fails with the client's own kind of error, which says these words."""
    try:
        said = f"answered: {call()}"
    except kind as error:
        said = f"failed: {error}"
    missing = [word for word in ("failed: ", *words) if word not in said]
    assert not missing, f"{missing} not in: {said}"


def count_model() -> Any:
    """What answers of a form are parsed as."""
    from pydantic import BaseModel, Field

    class Count(BaseModel):
        """How many there are."""

        count: int = Field(ge=0, le=99)

    return Count


def counts(found: Any) -> None:
    """An answer was parsed."""
    assert 0 <= found.count <= 99, found


def equals(found: object, expected: object) -> None:
    assert found == expected, f"{found!r} instead of {expected!r}"


def openai_calls() -> Calls:
    import openai

    client = openai.OpenAI(base_url=given.base_url, api_key=KEY, max_retries=0)

    def ask(messages: list[Any] = ASKED, **options: Any) -> Any:
        return client.chat.completions.create(model=given.model, messages=messages, **options)

    def text(*args: Any, **options: Any) -> str:
        return ask(*args, **options).choices[0].message.content

    def stream() -> None:
        chunks = list(ask(stream=True, stream_options={"include_usage": True}))
        equals("".join(c.choices[0].delta.content or "" for c in chunks if c.choices), given.answer)
        assert chunks[-1].usage.total_tokens > 0

    def turns() -> None:
        assert text(TURNS)
        image = {"type": "image_url", "image_url": {"url": DATA_URI, "detail": None}}
        parts = [image, {"type": "text", "text": given.question}, {"type": "text", "text": ""}]
        silent = {"role": "assistant", "content": None}
        assert text([*TURNS[:2], silent, {"role": "user", "content": parts}])

    def options() -> None:
        likeliest = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0}
        equals(text(extra_body=likeliest, temperature=1), given.answer)
        equals(text(extra_body={"a_field_of_tomorrow": {"x": 1}}, user="me", store=False), given.answer)
        equals(ask(max_tokens=1).choices[0].finish_reason, "length")
        assert ask().usage.prompt_tokens > 10

    def models() -> None:
        (card,) = client.models.list().data
        equals(card.id, given.model)
        equals(client.models.retrieve(given.model).id, given.model)
        raises(openai.NotFoundError, lambda: client.models.retrieve("nobody"), "nobody")

    def leaves() -> None:
        hasty = client.with_options(timeout=0.05).chat.completions
        raises(openai.APITimeoutError, lambda: hasty.create(model=given.model, messages=ASKED))
        equals(text(), given.answer)

    def many() -> None:
        async def all_at_once() -> list[str]:
            async with openai.AsyncOpenAI(base_url=given.base_url, api_key=KEY) as client:
                calls = [client.chat.completions.create(model=given.model, messages=ASKED) for _ in range(16)]
                return [found.choices[0].message.content for found in await asyncio.gather(*calls)]

        equals(asyncio.run(all_at_once()), [given.answer] * 16)

    return {
        "image": lambda: equals(text(), given.answer), "stream": stream, "turns": turns, "options": options,
        "models": models, "errors": lambda: openai_errors(client), "leaving": leaves, "many": many,
        **openai_forms(client),
    }  # fmt: skip


def openai_forms(client: Any) -> Calls:
    import openai

    asked = {"model": given.model, "messages": ASKED}

    def schema() -> None:
        wanted = {**asked, "response_format": count_model()}
        counts(client.chat.completions.parse(**wanted).choices[0].message.parsed)
        with client.chat.completions.stream(**wanted) as stream:
            counts(stream.get_final_completion().choices[0].message.parsed)

    def function() -> None:
        tool = openai.pydantic_function_tool(count_model(), name="count")
        answer = client.chat.completions.parse(**asked, tools=[tool], tool_choice="required")
        (call,) = answer.choices[0].message.tool_calls
        counts(call.function.parsed_arguments)
        called = {"name": call.function.name, "arguments": call.function.arguments}
        turns = [
            {"role": "assistant", "tool_calls": [{"id": call.id, "type": "function", "function": called}]},
            {"role": "tool", "tool_call_id": call.id, "content": "noted"},
        ]
        assert client.chat.completions.create(model=given.model, messages=[*ASKED, *turns])

    return {"schema": schema, "function": function}


def openai_errors(client: Any) -> None:
    import openai

    def asking(content: Any, model: str = given.model, **options: Any) -> Callable[[], object]:
        messages = [{"role": "user", "content": content}]
        return lambda: client.chat.completions.create(model=model, messages=messages, **options)

    bad = openai.BadRequestError
    raises(bad, asking(LONG), "context_length_exceeded")
    raises(bad, asking("Hello", extra_body={"guided_json": {}}), "guided_json")
    raises(bad, asking("Hello", logprobs=True, top_logprobs=30), "top_logprobs")
    raises(bad, asking("Hello", temperature=-1), "temperature")
    raises(bad, asking([{"type": "image_url", "image_url": DATA_URI}]), "image_url")
    raises(openai.NotFoundError, asking("Hello", model="nobody"), "nobody")
    raises(openai.AuthenticationError, client.with_options(api_key="wrong").models.list)


def litellm_calls() -> Calls:
    import litellm

    litellm.suppress_debug_info = True

    def ask(messages: list[Any] = ASKED, **options: Any) -> Any:
        options = {"api_key": KEY, "model": f"openai/{given.model}", **options}
        return litellm.completion(api_base=given.base_url, messages=messages, max_retries=0, **options)

    def text(*args: Any, **options: Any) -> str:
        return ask(*args, **options).choices[0].message.content

    def stream() -> None:
        pieces = [chunk.choices[0].delta.content or "" for chunk in ask(stream=True)]
        equals("".join(pieces), given.answer)

    def options() -> None:
        equals(text(top_k=1, temperature=1), given.answer)
        equals(ask(max_tokens=1).choices[0].finish_reason, "length")
        assert ask().usage.prompt_tokens > 10

    def errors() -> None:
        too_long = litellm.ContextWindowExceededError
        raises(too_long, lambda: text([{"role": "user", "content": LONG}]), "80019")
        raises(litellm.BadRequestError, lambda: text(extra_body={"guided_json": {}}), "guided_json")
        raises(litellm.NotFoundError, lambda: text(model="openai/nobody"), "nobody")
        raises(litellm.AuthenticationError, lambda: text(api_key="wrong"))

    def many() -> None:
        async def all_at_once() -> list[str]:
            options = {"api_key": KEY, "api_base": given.base_url, "model": f"openai/{given.model}"}
            calls = [litellm.acompletion(messages=ASKED, **options) for _ in range(16)]
            return [found.choices[0].message.content for found in await asyncio.gather(*calls)]

        equals(asyncio.run(all_at_once()), [given.answer] * 16)

    def schema() -> None:
        counts(count_model().model_validate_json(text(response_format=count_model())))

    return {
        "image": lambda: equals(text(), given.answer), "stream": stream, "turns": lambda: text(TURNS),
        "options": options, "errors": errors, "many": many, "schema": schema,
    }  # fmt: skip


def langchain_calls() -> Calls:
    import openai
    from langchain_openai import ChatOpenAI

    def chat(**options: Any) -> Any:
        options = {"model": given.model, "api_key": KEY, "max_retries": 0, **options}
        return ChatOpenAI(base_url=given.base_url, **options)

    def options() -> None:
        equals(chat(extra_body={"top_k": 1}, temperature=1).invoke(ASKED).content, given.answer)
        cut = chat(max_tokens=1).invoke(ASKED)
        equals(cut.response_metadata["finish_reason"], "length")
        assert cut.usage_metadata["input_tokens"] > 10

    def errors() -> None:
        raises(openai.BadRequestError, lambda: chat().invoke(LONG), "context_length_exceeded")
        raises(openai.BadRequestError, lambda: chat(top_logprobs=30).invoke(ASKED), "top_logprobs")
        raises(openai.NotFoundError, lambda: chat(model="nobody").invoke(ASKED), "nobody")
        raises(openai.AuthenticationError, lambda: chat(api_key="wrong").invoke(ASKED))

    def stream() -> None:
        equals("".join(chunk.content for chunk in chat().stream(ASKED)), given.answer)

    def many() -> None:
        equals([found.content for found in chat().batch([ASKED] * 16)], [given.answer] * 16)

    return {
        "image": lambda: equals(chat().invoke(ASKED).content, given.answer), "stream": stream,
        "turns": lambda: chat().invoke(TURNS), "options": options, "errors": errors, "many": many,
        "schema": lambda: counts(chat().with_structured_output(count_model()).invoke(ASKED)),
        "function": lambda: counts(
            chat().with_structured_output(count_model(), method="function_calling").invoke(ASKED)
        ),
    }  # fmt: skip


def llama_index_calls() -> Calls:
    import openai
    from llama_index.core.base.llms.types import ChatMessage, ImageBlock, TextBlock
    from llama_index.llms.openai_like import OpenAILike

    asked = [
        ChatMessage(
            role="user",
            blocks=[ImageBlock(image=PICTURE, image_mimetype="image/png"), TextBlock(text=given.question)],
        )
    ]
    turns = [
        ChatMessage(role="system", content="Answer with one word."),
        ChatMessage(role="user", content="Hello"),
        ChatMessage(role="assistant", content="Hi"),
        *asked,
    ]

    def llm(**options: Any) -> Any:
        options = {"model": given.model, "api_key": KEY, "max_retries": 0, "temperature": 0, **options}
        return OpenAILike(api_base=given.base_url, is_chat_model=True, **options)

    def options() -> None:
        equals(llm(additional_kwargs={"extra_body": {"top_k": 1}}).chat(asked).message.content, given.answer)
        equals(llm(max_tokens=1).chat(asked).raw.choices[0].finish_reason, "length")

    def errors() -> None:
        long = [ChatMessage(role="user", content=LONG)]
        raises(openai.BadRequestError, lambda: llm().chat(long), "context_length_exceeded")
        raises(openai.NotFoundError, lambda: llm(model="nobody").chat(asked), "nobody")
        raises(openai.AuthenticationError, lambda: llm(api_key="wrong").chat(asked))

    def stream() -> None:
        equals("".join(part.delta or "" for part in llm().stream_chat(asked)), given.answer)

    def many() -> None:
        async def all_at_once() -> list[str]:
            return [
                found.message.content
                for found in await asyncio.gather(*[llm().achat(asked) for _ in range(16)])
            ]

        equals(asyncio.run(all_at_once()), [given.answer] * 16)

    return {
        "image": lambda: equals(llm().chat(asked).message.content, given.answer), "stream": stream,
        "turns": lambda: llm().chat(turns), "options": options, "errors": errors, "many": many,
    }  # fmt: skip


def pydantic_ai_calls() -> Calls:
    from pydantic_ai import Agent, BinaryContent, NativeOutput, PromptedOutput
    from pydantic_ai.exceptions import ModelHTTPError
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.profiles.openai import OpenAIModelProfile
    from pydantic_ai.providers.openai import OpenAIProvider

    Count = count_model()
    asked = [BinaryContent(PICTURE, media_type="image/png"), given.question]

    def agent(model: str = given.model, key: str = KEY, **options: Any) -> Any:
        provider = OpenAIProvider(base_url=given.base_url, api_key=key)
        profile = OpenAIModelProfile(supports_json_object_output=False)
        return Agent(OpenAIChatModel(model, provider=provider, profile=profile), **options)

    def options() -> None:
        equals(agent().run_sync(asked, model_settings={"extra_body": {"top_k": 1}}).output, given.answer)
        assert agent().run_sync(asked, model_settings={"max_tokens": 2}).output
        assert agent().run_sync(asked).usage.input_tokens > 10

    def turns() -> None:
        first = agent(instructions="Answer with one word.").run_sync(asked)
        assert agent().run_sync("And now?", message_history=first.all_messages()).output

    def errors() -> None:
        raises(ModelHTTPError, lambda: agent().run_sync(LONG), "400", "context_length_exceeded")
        raises(ModelHTTPError, lambda: agent(model="nobody").run_sync(asked), "404")
        raises(ModelHTTPError, lambda: agent(key="wrong").run_sync(asked), "401")

    def stream() -> None:
        async def pieces() -> list[str]:
            async with agent().run_stream(asked) as found:
                return [piece async for piece in found.stream_text(delta=True)]

        equals("".join(asyncio.run(pieces())), given.answer)

    if given.structured:
        return {
            "prompted JSON": lambda: equals(
                agent(output_type=PromptedOutput(Count)).run_sync(asked).output.count, 4
            )
        }
    return {
        "image": lambda: equals(agent().run_sync(asked).output, given.answer), "stream": stream,
        "turns": turns, "options": options, "errors": errors,
        "schema": lambda: counts(agent(output_type=NativeOutput(Count)).run_sync(asked).output),
        "function": lambda: counts(agent(output_type=Count).run_sync(asked).output),
    }  # fmt: skip


def instructor_calls() -> Calls:
    import instructor
    import openai
    from instructor.exceptions import InstructorError

    Count = count_model()
    client = openai.OpenAI(base_url=given.base_url, api_key=KEY, max_retries=0)

    def ask(mode: instructor.Mode, model: str = given.model) -> Any:
        asking = instructor.from_openai(client, mode=mode)
        return asking.create(model=model, response_model=Count, messages=ASKED, max_retries=0)

    def errors() -> None:
        refused = (openai.NotFoundError, InstructorError)
        raises(refused, lambda: ask(instructor.Mode.TOOLS, "nobody"), "nobody")

    if given.structured:
        return {"prompted JSON": lambda: equals(ask(instructor.Mode.MD_JSON).count, 4)}
    return {
        "errors": errors,
        "schema": lambda: counts(ask(instructor.Mode.JSON_SCHEMA)),
        "function": lambda: counts(ask(instructor.Mode.TOOLS)),
    }


CLIENTS: dict[str, Callable[[], Calls]] = {
    "openai (Python)": openai_calls,
    "litellm": litellm_calls,
    "langchain-openai": langchain_calls,
    "llama-index": llama_index_calls,
    "instructor": instructor_calls,
    "pydantic-ai": pydantic_ai_calls,
}


def main() -> None:
    for name, call in CLIENTS[sys.argv[1]]().items():
        try:
            call()
        except Exception as error:  # whatever a client raises is what its users see
            outcome = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        else:
            outcome = "ok"
        print(json.dumps({"call": name, "outcome": outcome}), flush=True)


if __name__ == "__main__":
    main()
