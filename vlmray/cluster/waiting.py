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

from vlmray.cluster.placement import place
from vlmray.cluster.resources import present, present_nodes, startable, startable_nodes
from vlmray.errors import RunError

_LOG = logging.getLogger(__name__)
_PATIENCE_S = 10.0
_LONG_PATIENCE_S = 60.0
_PERIOD_S = 1.0
_RENEWED_S = 60.0
_LEAST = 1e-3  # what is left of shares of a CPU is not exact


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Actors that a job asks for."""

    count: int
    least: int
    """Without so many of them it does not go on; with fewer than `count` it only takes longer."""

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

    is_pool: bool = False
    """All that are wanted are there as actors, with a place or without; others have done their work."""

    @property
    def each(self) -> str:
        """What each takes, in words."""
        return " and ".join(f"{amount:g} {kind}" for kind, amount in self.resources.items() if amount)


class Waiting:
    """What a job waits for, looked at again and again.

    Args:
        asked: What it asks for.
        limit_s: How long to wait for what the cluster neither has nor could start.
        say: Takes the line.
    """

    def __init__(self, asked: Asked, limit_s: float, say: Callable[[str], None] = _LOG.warning) -> None:
        self._asked = asked
        self._limit_s = limit_s
        self._say = say
        self._since = self._told = time.monotonic()
        self._looked = 0.0
        self._line = ""

    def look(self) -> None:
        """Say it where something has been missing for some time, and again when that changes.

        Whoever polls may call it as often as it likes.

        Raises:
            RunError: it has been missing for as long as was to be waited, and will not come.
        """
        now = time.monotonic()
        if now - self._looked < _PERIOD_S:
            return
        self._looked = now
        num_placed, num_waiting = self._count_actors() if self._asked.each else (self._asked.count, 0)
        missing, waited_s = self._asked.count - num_placed, now - self._since
        if self._asked.is_pool:
            missing = min(missing, num_waiting)
        if missing <= 0:
            self._since, self._line = now, ""
            return
        line = self._describe(missing, num_placed)
        if num_placed < self._asked.least and waited_s > self._limit_s and not self._can_be():
            cure = f"start nodes that have them, or lower --{self._asked.option}"
            raise RunError(f"waited {waited_s:.0f} s: {line}; {cure}")
        patience_s = _PATIENCE_S if self._is_short(missing) else _LONG_PATIENCE_S
        if waited_s > patience_s and (line != self._line or now - self._told > _RENEWED_S):
            self._say(line)
            self._line, self._told = line, now

    def _describe(self, missing: int, num_placed: int) -> str:
        asked, free = self._asked, ray.available_resources()
        more, plural = " more" if num_placed >= asked.least else "", "s" if missing > 1 else ""
        there = (
            f"{free.get(kind, 0):g} {kind} free of {present(kind):g} and may start "
            f"{max(0.0, startable(kind) - present(kind)):g}"
            for kind, amount in asked.resources.items()
            if amount
        )
        each = " each" if missing > 1 else ""
        return (
            f"waiting for {missing}{more} {asked.name}{plural} with {asked.each}{each}: "
            f"the cluster has {', '.join(there)}"
        )

    def _count_actors(self) -> tuple[int, int]:
        """Count the actors that have a place on some node, begun there or not, and those that have none."""
        job = ray.get_runtime_context().get_job_id()
        are_placed = [
            actor["State"] in ("ALIVE", "PENDING_CREATION") and actor["Pid"] > 0
            for actor in state.actors().values()
            if self._asked.actors in actor["ActorClassName"]
            and (self._asked.is_served or actor["JobID"] == job)
            and actor["State"] != "DEAD"
        ]
        return sum(are_placed), len(are_placed) - sum(are_placed)

    def _is_short(self, missing: int) -> bool:
        """Tell whether it is not there; else it may be on its way, or on several nodes in parts."""
        free = ray.available_resources()
        return any(
            missing * amount > free.get(kind, 0) + _LEAST for kind, amount in self._asked.resources.items()
        )

    def _can_be(self) -> bool:
        """Tell whether the nodes that are there, with all that they have, or could be, are enough."""
        bundles = [self._asked.resources] * self._asked.least
        return any(place(bundles, nodes) for nodes in (present_nodes(), startable_nodes()))


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


def tell_if_taken(*, cpus: float) -> None:
    """Say in one line that others hold the CPUs without which a job does not get on.

    Args:
        cpus: What it needs to get on.
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
