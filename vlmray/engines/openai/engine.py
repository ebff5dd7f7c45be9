"""An engine that has a server answer: one that runs anywhere and speaks OpenAI's protocol."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, overload

from vlmray.config import EndpointConfig
from vlmray.engines.base import Cancelled, OnEnd, OnLogprobs, OnText, check_request, failed_completion
from vlmray.engines.loop import BackgroundLoop
from vlmray.engines.openai.asking import Asker, list_models
from vlmray.engines.openai.call import Call, Tell
from vlmray.engines.openai.client import Endpoint, api_key, find_model
from vlmray.engines.openai.flow import MOST_IN_FLIGHT, Flow
from vlmray.engines.openai.gate import Gate
from vlmray.engines.openai.images import PixelBounds
from vlmray.engines.openai.shares import Keeper, LocalKeeper
from vlmray.engines.openai.wire import to_body, with_own_seed
from vlmray.schema import Completion, GenerationRequest

_NUM_ENCODERS = 2


class OpenAIEngine:
    """Asks a server, many requests at a time; several threads may be in `generate`.

    Args:
        url: The server's address, with or without `/v1`.
        model: The name by which it knows the model.
        keeper: Has the limit of what may be in flight.
        key: Key to send.
        bounds: Pixels that images are scaled to.
        timeout_s: How long the server may be silent, and take for one answer.

    Raises:
        EndpointError: It does not answer, wants another key, or does not serve the model.
    """

    def __init__(
        self,
        url: str,
        model: str,
        keeper: Keeper,
        *,
        key: str | None = None,
        bounds: PixelBounds | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self.waited_s = 0.0
        self._model = model
        self._bounds = bounds or PixelBounds()
        self._encoders = ThreadPoolExecutor(_NUM_ENCODERS, thread_name_prefix="encode")
        self._loop = BackgroundLoop("endpoint")
        self._endpoint, self._gate, self._asker = self._loop.run(self._open(url, key, keeper, timeout_s))
        try:
            self.max_model_len = find_model(
                model, self._loop.run(list_models(self._endpoint, lost_s=timeout_s)), url
            )
        except BaseException:
            self.close()
            raise

    @classmethod
    def of(
        cls, model_id: str, config: EndpointConfig, keeper: Keeper | None = None, key: str | None = None
    ) -> OpenAIEngine:
        """Make the engine of a configuration, with a limit of its own unless somebody else keeps one."""
        url = str(config.endpoint)
        return cls(
            url,
            model_id,
            keeper or LocalKeeper(Flow(config.max_in_flight or MOST_IN_FLIGHT)),
            key=key or api_key(url),
            bounds=PixelBounds(least=config.min_pixels, most=config.max_pixels),
            timeout_s=config.endpoint_timeout_s,
        )

    @staticmethod
    async def _open(
        url: str, key: str | None, keeper: Keeper, timeout_s: float
    ) -> tuple[Endpoint, Gate, Asker]:
        endpoint, gate = Endpoint(url, key), Gate(keeper)
        return endpoint, gate, Asker(endpoint, gate, timeout_s)

    def prepare(self, requests: Sequence[GenerationRequest]) -> Sequence[GenerationRequest]:
        """Begin to encode images."""
        return _Prepared(requests, [self._encoders.submit(self._to_body, each) for each in requests])

    def check(self, request: GenerationRequest) -> Completion | None:
        """Return the failed completion of a request that need not be sent, else None."""
        try:
            _check(request)
        except Exception as error:  # whatever is wrong with a row is its answer
            return failed_completion(error)
        return None

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_text: OnText | None = None,
        on_end: OnEnd | None = None,
        cancelled: Cancelled | None = None,
        on_logprobs: OnLogprobs | None = None,
    ) -> list[Completion]:
        """Have all requests answered that are not `cancelled`, in order.

        Raises:
            EndpointError: The server does not answer any more, or refuses to answer anything.
        """
        started = time.perf_counter()
        ready = requests if isinstance(requests, _Prepared) else self.prepare(requests)
        assert isinstance(ready, _Prepared)
        wait(ready.bodies[:1])
        self.waited_s += time.perf_counter() - started
        call = Call(on_text, on_end, cancelled, on_logprobs)
        return call.run(self._loop, [functools.partial(self._answer, body) for body in ready.bodies])

    async def _answer(self, body: Future[dict[str, Any]], tell: Tell | None) -> Completion:
        try:
            encoded = await asyncio.wrap_future(body)
        except Exception as error:  # whatever is wrong with a row is its answer
            return failed_completion(error)
        return await self._asker.ask(encoded, tell)

    def close(self) -> None:
        """Cut off what is in flight and end the thread."""
        if self._loop.is_closed:
            return
        self._encoders.shutdown(wait=False, cancel_futures=True)
        self._loop.cancel()
        self._loop.run(self._endpoint.close())
        self._loop.close()

    def _to_body(self, request: GenerationRequest) -> dict[str, Any]:
        _check(request)
        return to_body(with_own_seed(request), self._model, self._bounds)


def _check(request: GenerationRequest) -> None:
    check_request(request)
    if request.adapter is not None:
        raise ValueError(f"unknown adapter {request.adapter!r}; known: none, a server has names for models")


class _Prepared(Sequence[GenerationRequest]):
    """Requests whose bodies are being made."""

    def __init__(self, requests: Sequence[GenerationRequest], bodies: list[Future[dict[str, Any]]]) -> None:
        self.bodies = bodies
        self._requests = requests

    @overload
    def __getitem__(self, place: int) -> GenerationRequest: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[GenerationRequest]: ...
    def __getitem__(self, place: int | slice) -> GenerationRequest | Sequence[GenerationRequest]:
        return self._requests[place]

    def __len__(self) -> int:
        return len(self._requests)
