"""One limit of a server for all who ask it on a cluster.

    Gate of each replica -> SharedKeeper -> named actor with the Shares of that server

The actor belongs to the driver or replica that was first and ends with it; the others start another one then,
with the limit as they knew it last, and go on by what they were told meanwhile.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from vlmray.config import InferConfig
from vlmray.engines.openai import client
from vlmray.engines.openai.flow import MOST_IN_FLIGHT, Flow
from vlmray.engines.openai.shares import Allowance, Report, Shares, State

_NAMESPACE = "vlmray"
_PATIENCE_S = 5.0
_ALONE = Allowance(places=1, state=State(limit=4.0))
"""What is allowed before anybody was asked."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key on its way to where it is needed; what prints it does not show it."""

    value: str | None = field(repr=False)


def api_key(config: InferConfig) -> Key | None:
    """Return the key of a run's server, as this process has it."""
    return Key(client.api_key(config.endpoint)) if config.endpoint else None


def engine_options(config: InferConfig, key: Key | None) -> dict[str, Any]:
    """Return what `load_engine` is told of a run's server; nothing where it has none."""
    if config.engine != "openai" or key is None:
        return {}
    keeper = SharedKeeper(str(config.endpoint), config.max_in_flight or MOST_IN_FLIGHT)
    return {"keeper": keeper, "key": key.value}


class _Actor(Shares):
    """The limit of a server, on the cluster."""

    def __init__(self, most: int, first: float) -> None:
        super().__init__(Flow(most, first))


def find_actor(url: str, most: int, first: float = _ALONE.state.limit, **options: Any) -> Any:
    """Return the handle of a server's actor, which is started if there is none.

    Args:
        url: The server.
        most: The most that may be in flight, if it is started.
        first: What the limit is then.
        **options: Of Ray, for where it is started.
    """
    name = f"endpoint-{hashlib.sha256(client.base_url(url).encode()).hexdigest()[:16]}"
    actor = ray.remote(num_cpus=0)(_Actor)
    return actor.options(name=name, namespace=_NAMESPACE, get_if_exists=True, **options).remote(most, first)


class SharedKeeper:
    """The way to a server's actor, which may be lost and is started again.

    Args:
        url: The server.
        most: The most that may be in flight, whatever others allow.
    """

    pace_s = 0.1

    def __init__(self, url: str, most: int) -> None:
        self._url = url
        self._most = most
        self._actor: Any = None
        self._last = _ALONE

    async def report(self, report: Report) -> Allowance:
        """Pass a report on; without the actor what it said last holds."""
        try:
            if self._actor is None:
                self._actor = await asyncio.to_thread(
                    find_actor, self._url, self._most, self._last.state.limit
                )
            async with asyncio.timeout(_PATIENCE_S):
                found: Allowance = await self._actor.report.remote(report)
        except TimeoutError:  # its machine may be lost, which Ray will notice
            return self._last
        except (ray.exceptions.RayError, ValueError):  # lost, or just about to end
            self._actor = None
            return self._last
        self._last = replace(found, places=min(found.places, self._most))
        return self._last
