"""The model replicas, as gateways ask them: whichever is there, and another where one dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from vlmray.schema import GenerationRequest
from vlmray.serving.backend import Piece, Reply
from vlmray.serving.errors import BusyError

MODEL_NAME = "model"
"""Name of their deployment."""

MAX_TRIES = 5
PATIENCE_S = 2.0

_LOG = logging.getLogger(__name__)
_LOST = (RayActorError, WorkerCrashedError, ObjectLostError, ReplicaUnavailableError)


class Replicas:
    """The model replicas as a `vlmray.serving.gateway.Backend`."""

    def __init__(self, handle: DeploymentHandle, min_replicas: int, startup_timeout_s: float) -> None:
        self._handle = handle
        self._min_replicas = min_replicas
        self._startup_timeout_s = startup_timeout_s
        self._max_model_len: int | None = None

    async def answer(
        self, request: GenerationRequest, *, stream: bool
    ) -> AsyncGenerator[str | Piece | Reply]:
        """Pass a request on; if its replica dies before the answer began, to another one."""
        handle = self._handle.options(stream=True, multiplexed_model_id=request.adapter or "")
        for tries_left in reversed(range(MAX_TRIES)):
            piece: str | Piece | Reply | None = None
            pieces: Any = handle.answer.remote(request, stream)
            following = aiter(pieces)
            try:
                piece = await self._first(following)
                yield piece
                async for piece in following:
                    yield piece
                return
            except (asyncio.CancelledError, GeneratorExit, BusyError):
                if not isinstance(piece, Reply):
                    pieces.cancel()
                raise
            except BackPressureError as error:
                raise BusyError("too many requests are waiting") from error
            except DeploymentUnavailableError as error:
                raise BusyError("no replica can be started; the server's log says why") from error
            except _LOST as error:
                if piece is not None or not tries_left:
                    raise
                _LOG.warning("a replica was lost, its request is tried again: %s", type(error).__name__)

    async def _first(self, pieces: AsyncIterator[str | Piece | Reply]) -> str | Piece | Reply:
        """Wait for the first piece, while there is a replica, and for a while where there is none."""
        first = asyncio.ensure_future(anext(pieces))
        try:
            while not (await asyncio.wait([first], timeout=self._startup_timeout_s))[0]:
                if not await self._num_running():
                    raise BusyError(f"no replica has started within {self._startup_timeout_s:g} s")
            return first.result()
        finally:
            first.cancel()

    async def is_ready(self) -> bool:
        """Tell whether a replica is running, or would be started for a request."""
        return bool(not self._min_replicas or await self._num_running())

    async def max_model_len(self) -> int | None:
        """Ask a replica, once there is one; a busy one is not waited for."""
        if self._max_model_len is None and await self._num_running():
            with contextlib.suppress(TimeoutError, BackPressureError, *_LOST):
                async with asyncio.timeout(PATIENCE_S):
                    self._max_model_len = await self._handle.max_model_len.remote()
        return self._max_model_len

    async def _num_running(self) -> int:
        status = await asyncio.to_thread(serve.status)
        application = status.applications.get(serve.get_replica_context().app_name)
        model = application.deployments.get(MODEL_NAME) if application else None
        states: Mapping[Any, int] = model.replica_states if model else {}
        return states.get("RUNNING", 0)
