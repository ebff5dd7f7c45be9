"""Say in the driver what a run's server keeps it waiting for; its replicas have no terminal."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import ray

from vlmray import cluster
from vlmray.config import InferConfig
from vlmray.engines.openai.flow import MOST_IN_FLIGHT
from vlmray.engines.openai.waiting import Waiting
from vlmray.inference.endpoint.keeping import find_actor

_PERIOD_S = 1.0
_PATIENCE_S = 5.0


@contextlib.contextmanager
def saying_how_the_server_is(config: InferConfig, say: Callable[[str], None]) -> Iterator[None]:
    """Look, in a thread, how the server does that answers what is inside; nothing where there is none."""
    if config.engine != "openai":
        yield
        return
    waiting = Waiting(str(config.endpoint), config.endpoint_timeout_s, say)
    most, over = config.max_in_flight or MOST_IN_FLIGHT, threading.Event()
    # Started here it lives on this machine, whose loss is the run's anyway.
    actor = find_actor(str(config.endpoint), most, label_selector=cluster.driver_node())

    def look() -> None:
        while not over.wait(_PERIOD_S) and ray.is_initialized():
            with contextlib.suppress(ray.exceptions.RayError):  # another run's, which has ended
                waiting.look(ray.get(actor.state.remote(), timeout=_PATIENCE_S))

    thread = threading.Thread(target=look, daemon=True, name="server")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=2 * _PERIOD_S)
