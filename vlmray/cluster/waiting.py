"""Say what a job waits for."""

from __future__ import annotations

import logging
import time

import ray

from vlmray.cluster.resources import present

_LOG = logging.getLogger(__name__)

_PATIENCE_S = 5.0


def tell_if_taken(*, cpus: float, gpus: float = 0) -> None:
    """Say in one line what a job waits for, where others hold what it asks for.

    Args:
        cpus: What it needs to get on.
        gpus: The same of GPUs.
    """
    deadline = time.monotonic() + _PATIENCE_S  # a cluster that has just started is slow to tell
    while any(asked > ray.available_resources().get(kind, 0) + 1e-3 for kind, asked in _asked(cpus, gpus)):
        if time.monotonic() > deadline:
            free = ray.available_resources()
            found = (
                f"{asked:g} {kind}s, and {free.get(kind, 0):g} of {present(kind):g} are free"
                for kind, asked in _asked(cpus, gpus)
            )
            _LOG.warning("waiting until others are done: the job asks for %s", " and ".join(found))
            return
        time.sleep(0.1)


def _asked(cpus: float, gpus: float) -> list[tuple[str, float]]:
    return [(kind, asked) for kind, asked in (("CPU", cpus), ("GPU", gpus)) if asked]
