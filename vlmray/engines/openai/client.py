"""An OpenAI-compatible server, asked once for each answer: what it says, or how it does not."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal
from urllib.parse import urlsplit

import openai

from vlmray.config.common import API_KEY
from vlmray.engines.base import failed_completion
from vlmray.engines.openai.wire import retry_after_s, to_completion
from vlmray.errors import RunError, one_line
from vlmray.schema import Completion

for _name in ("httpx", "httpx2"):  # which the client is made of: a line for every request
    logging.getLogger(_name).setLevel(logging.WARNING)

_OPENAI_HOST, _OPENAI_KEY = "api.openai.com", "OPENAI_API_KEY"
_CONNECT_S = 10.0
_MODELS_S = 30.0
_MOST_NAMES = 20
_BUSY = (408, 425, 429, 502, 503, 504, 529)
_REFUSES_US = (401, 403, 404)
_NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached")


class EndpointError(RunError):
    """The server does not answer, or not as it should."""


class UnansweredError(Exception):
    """A request that was not answered and may be asked again.

    Attributes:
        kind: As in `Outcome`.
        retry_after_s: How long the server wants to be left alone.
    """

    def __init__(
        self, reason: str, kind: Literal["refused", "lost", "failed"], retry_after_s: float = 0.0
    ) -> None:
        super().__init__(reason)
        self.kind: Literal["refused", "lost", "failed"] = kind
        self.retry_after_s = retry_after_s


def api_key(url: str, variable: str = API_KEY) -> str | None:
    """Return the key to send to a server: none of OpenAI's goes to anybody else."""
    own = os.environ.get(variable)
    return own or (os.environ.get(_OPENAI_KEY) if urlsplit(url).hostname == _OPENAI_HOST else None)


def base_url(url: str) -> str:
    """Return a server's address in one way, with `/v1` left out."""
    return url.rstrip("/").removesuffix("/v1")


class Endpoint(AbstractAsyncContextManager["Endpoint"]):
    """A server, for use inside one event loop.

    Args:
        url: Its address, with or without `/v1`.
        key: Key to send; None sends none worth anything.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = base_url(url)
        self._client = openai.AsyncOpenAI(
            base_url=f"{self.url}/v1",
            api_key=key or "none",
            max_retries=0,
            timeout=openai.Timeout(None, connect=_CONNECT_S),  # whoever asks knows how long to wait
        )

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Leave; what is in flight is cut off."""
        await self._client.close()

    async def models(self) -> dict[str, int | None]:
        """Return the names that models are served by, each with the most tokens of a prompt and its answer.

        Raises:
            UnansweredError: It does not answer now.
            EndpointError: It wants another key, or is no such server.
        """
        try:
            page = await self._client.with_options(timeout=_MODELS_S).models.list()
            lengths = {model.id: getattr(model, "max_model_len", None) for model in page.data}
        except openai.APIStatusError as error:
            if error.status_code in _BUSY:
                raise _unanswered(error) from error
            raise EndpointError(f"{self.url} does not list its models: {_say(error)}") from error
        except openai.APIConnectionError as error:
            raise UnansweredError(f"{self.url} does not list its models: {_say(error)}", "lost") from error
        except (openai.OpenAIError, AttributeError, TypeError, ValueError) as error:
            raise EndpointError(
                f"{self.url} does not list its models as OpenAI's protocol has it: {one_line(error)}"
            ) from error
        return {name: length if isinstance(length, int) else None for name, length in lengths.items()}

    async def ask(self, body: dict[str, Any], on_text: Callable[[str], None] | None = None) -> Completion:
        """Ask once; a request that it will never answer comes back as a failed completion.

        Args:
            body: As `to_body` returns it.
            on_text: Called with each piece of text as it comes; without, the answer comes in one piece.

        Raises:
            UnansweredError: It does not answer now.
            EndpointError: It will not answer any request.
        """
        try:
            if on_text is not None:
                return await self._ask_stream(body, on_text)
            found = await self._client.chat.completions.create(**body)
            (choice,) = found.choices
            logprobs = choice.logprobs and choice.logprobs.content
            return to_completion(choice.message.content, choice.finish_reason, found.usage, logprobs)
        except openai.APIStatusError as error:
            return self._judge(error)
        except (UnansweredError, EndpointError):
            raise
        except Exception as error:
            # The connection broke, which in the middle of an answer is an error of whatever speaks HTTP below
            # `openai`; or what came is not of OpenAI's protocol.
            raise UnansweredError(_say(error), "lost") from error

    async def _ask_stream(self, body: dict[str, Any], on_text: Callable[[str], None]) -> Completion:
        chunks = await self._client.chat.completions.create(
            **body, stream=True, stream_options={"include_usage": True}
        )
        text, reason, usage = "", None, None
        logprobs: list[Any] | None = None
        async for chunk in chunks:
            for choice in chunk.choices:
                if choice.delta.content:
                    on_text(choice.delta.content)
                text += choice.delta.content or ""
                if choice.logprobs and choice.logprobs.content:
                    logprobs = [*(logprobs or ()), *choice.logprobs.content]
                reason = choice.finish_reason or reason
            usage = chunk.usage or usage
        if reason is None:
            raise UnansweredError("the stream ended before the answer did", "lost")
        return to_completion(text, reason, usage, logprobs)

    def _judge(self, error: openai.APIStatusError) -> Completion:
        """Return the completion of a request that is at fault itself.

        Raises:
            UnansweredError, EndpointError: The server is.
        """
        if error.status_code in _REFUSES_US or error.code in _NO_CREDIT:
            raise EndpointError(f"{self.url} refuses to answer: {_say(error)}") from error
        if error.status_code in _BUSY or error.status_code >= 500:
            raise _unanswered(error) from error
        failed = ValueError(_say(error))
        failed.code = error.code  # type: ignore[attr-defined]
        return failed_completion(failed)


def find_model(name: str, models: Mapping[str, int | None], url: str) -> int | None:
    """Return the most tokens of a prompt and its answer; None where the server does not say.

    Args:
        name: The model's.
        models: Those that the server lists.
        url: Where it is.

    Raises:
        EndpointError: It is not one of them.
    """
    if name not in models:
        known = ", ".join(sorted(models)[:_MOST_NAMES]) or "none"
        more = f" and {len(models) - _MOST_NAMES} more" if len(models) > _MOST_NAMES else ""
        raise EndpointError(f"{url} does not serve {name!r}; it serves {known}{more}")
    return models[name]


def _unanswered(error: openai.APIStatusError) -> UnansweredError:
    is_busy = error.status_code in _BUSY
    wait_s = retry_after_s(error.response.headers) if is_busy else 0.0
    return UnansweredError(_say(error), "refused" if is_busy else "failed", wait_s)


def _say(error: Exception) -> str:
    """Name what went wrong in a line: the server's own words where there are some."""
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    cause = error.__cause__
    return one_line(message or (f"{error} ({cause})" if cause else error), 500)
