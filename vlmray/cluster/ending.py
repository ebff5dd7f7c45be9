"""See that a run's actors end with it: for what one that lingers holds, the next run would wait."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray._private import state
from ray._private.worker import global_worker

_LOG = logging.getLogger(__name__)
_PATIENCE_S = 10.0
_PATIENCE_AFTER_ERROR_S = 2.0  # nobody wants what they are at
_PERIOD_S = 0.05


@contextlib.contextmanager
def ending_actors(actors: str) -> Iterator[None]:
    """End this job's actors once what is inside is over; where it is interrupted the job ends anyway.

    Args:
        actors: What their class is called by Ray, or a part of it.
    """
    try:
        yield
    except Exception:
        end_actors(actors, _PATIENCE_AFTER_ERROR_S)
        raise
    end_actors(actors, _PATIENCE_S)


def end_actors(actors: str, patience_s: float) -> None:
    """Wait until this job's actors of a class have ended, and kill those that do not end.

    Ray ends an actor that nobody holds a handle of, once its calls have returned. But a handle may lie in a
    cycle of objects, which Python does not collect while it only waits, and a call may hang.

    Args:
        actors: What the class is called by Ray, or a part of it.
        patience_s: How long they may take.
    """
    if _have_ended(actors, within_s=0):
        return
    gc.collect()
    if _have_ended(actors, within_s=patience_s):
        return
    worker: Any = global_worker.core_worker  # type: ignore[attr-defined]
    for actor in _left(actors):
        _LOG.info("actor %s does not end and is killed", actor)
        with contextlib.suppress(ValueError):  # it has ended meanwhile
            worker.kill_actor(ray.ActorID.from_hex(actor), True)
    _have_ended(actors, within_s=_PATIENCE_S)


def _have_ended(actors: str, *, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while _left(actors):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_PERIOD_S)
    return True


def _left(actors: str) -> list[str]:
    """Return the ids of this job's actors that have not ended."""
    if not ray.is_initialized():
        return []
    job = ray.get_runtime_context().get_job_id()
    return [
        found["ActorID"]
        for found in state.actors(job_id=ray.JobID.from_hex(job)).values()
        if actors in found["ActorClassName"] and found["State"] != "DEAD"
    ]
