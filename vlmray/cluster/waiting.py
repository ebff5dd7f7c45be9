"""Say in one line what a job waits for, renew it, and give up on what can never be."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import ray
from ray._private import state

from vlmray.cluster.resources import present, startable
from vlmray.errors import RunError

_LOG = logging.getLogger(__name__)
_PATIENCE_S = 10.0
_PERIOD_S = 1.0
_RENEWED_S = 60.0
_LEAST = 1e-3  # what is left of shares of a CPU is not exact


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Actors that a job cannot do without."""

    count: int
    name: str
    """What one of them is called."""

    resources: Mapping[str, float]
    """What each of them takes; nothing is there at once."""

    actors: str
    """What the class of the actors is called by Ray, or a part of it."""

    option: str
    """Option that asks for so many."""

    is_served: bool = False
    """They belong to Ray Serve, which goes on when the job that started it has ended."""

    def __str__(self) -> str:
        each = " and ".join(f"{amount:g} {kind}" for kind, amount in self.resources.items() if amount)
        plural = "s" if self.count > 1 else ""
        return f"{self.count} {self.name}{plural} with {each}{' each' if plural else ''}"


class Waiting:
    """What a job waits for, looked at again and again.

    Args:
        asked: What it cannot do without.
        limit_s: How long to wait for what the cluster neither has nor could start.
        say: Takes the line.
    """

    def __init__(self, asked: Asked, limit_s: float, say: Callable[[str], None] = _LOG.warning) -> None:
        self._asked = asked
        self._limit_s = limit_s
        self._say = say
        self._since = self._told = time.monotonic()
        self._line = ""

    def look(self) -> None:
        """Say it where something has been missing for some time, and again when that changes.

        Raises:
            RunError: it has been missing for as long as was to be waited, and will not come.
        """
        now = time.monotonic()
        if not any(self._asked.resources.values()) or self._num_placed() >= self._asked.count:
            self._since, self._line = now, ""
            return
        waited_s = now - self._since
        if waited_s > self._limit_s and not self._can_be():
            raise RunError(
                f"waited {waited_s:.0f} s for {self._asked}: {self._there()}; start nodes that have them, "
                f"or lower --{self._asked.option}"
            )
        line = f"waiting for {self._asked}: {self._there()}"
        if waited_s > _PATIENCE_S and (line != self._line or now - self._told > _RENEWED_S):
            self._say(line)
            self._line, self._told = line, now

    def _num_placed(self) -> int:
        """Count the actors that have a place on some node, whether they have begun there or not."""
        job = ray.get_runtime_context().get_job_id()
        return sum(
            self._asked.actors in actor["ActorClassName"]
            and (self._asked.is_served or actor["JobID"] == job)
            and actor["State"] in ("ALIVE", "PENDING_CREATION")
            and actor["Pid"] > 0
            for actor in state.actors().values()
        )

    def _there(self) -> str:
        free = ray.available_resources()
        parts = []
        for kind, amount in self._asked.resources.items():
            if amount:
                more = max(0.0, startable(kind) - present(kind))
                parts.append(f"{free.get(kind, 0):g} {kind} free of {present(kind):g} and may start {more:g}")
        return f"the cluster has {', '.join(parts)}"

    def _can_be(self) -> bool:
        """Tell whether the nodes that are there, with all that they have, or that could start, are enough."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        num_here = sum(_num_fitting(node, self._asked.resources) for node in nodes)
        could_start = {kind: startable(kind) for kind in self._asked.resources}
        return max(num_here, _num_fitting(could_start, self._asked.resources)) >= self._asked.count


def _num_fitting(there: Mapping[str, float], each: Mapping[str, float]) -> int:
    return int(min((there.get(kind, 0) + _LEAST) / amount for kind, amount in each.items() if amount))


@contextlib.contextmanager
def saying_what_is_awaited(
    asked: Asked, limit_s: float, say: Callable[[str], None] = _LOG.warning
) -> Iterator[None]:
    """Look, in a thread, while what is inside may wait in a call of Ray's.

    Raises:
        RunError: what is asked for will not come; only in a main thread, whose call is interrupted.
    """
    waiting, over = Waiting(asked, limit_s, say), threading.Event()
    found: list[RunError] = []
    is_main = threading.current_thread() is threading.main_thread()

    def look() -> None:
        while not over.wait(_PERIOD_S) and ray.is_initialized():
            try:
                waiting.look()
            except RunError as error:
                if is_main:
                    found.append(error)
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return

    thread = threading.Thread(target=look, daemon=True, name="waiting")
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if found:
            raise found[0] from None
        raise
    finally:
        over.set()
        thread.join(timeout=2 * _PERIOD_S)


def tell_if_taken(*, cpus: float, gpus: float = 0) -> None:
    """Say in one line that others hold the CPUs without which a job does not get on.

    Args:
        cpus: What it needs to get on.
        gpus: Not looked at.
    """
    deadline = time.monotonic() + _PATIENCE_S  # a cluster that has just started is slow to tell
    while cpus > ray.available_resources().get("CPU", 0) + _LEAST:
        if time.monotonic() > deadline:
            free = ray.available_resources().get("CPU", 0)
            _LOG.warning(
                "waiting until others are done: the job asks for %g CPUs, and %g of %g are free",
                cpus, free, present("CPU"),
            )  # fmt: skip
            return
        time.sleep(0.1)
