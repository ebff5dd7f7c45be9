"""Who is there: how many gateways there should be, and whether the job that a server runs for is over.

Serve's controller calls `one_per_node`, which reaches it as a value: it may be without this package.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray._private.state import available_resources_per_node, jobs
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

_HEAD = "node:__internal_head__"
_PATIENCE_S = 5.0
_PERIOD_S = 0.2


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose server one is."""

    name: str
    """Of what it serves."""

    url: str
    job_id: str | None
    """The job with which it ends; None: it stays."""


def one_per_node(context: Any) -> tuple[int, dict[str, Any]]:
    """Count the head and the nodes whose CPUs or GPUs somebody holds, as an autoscaling policy of Serve.

    An idle node is not counted: a gateway there would keep an autoscaler from taking it back.
    """
    free = available_resources_per_node()

    def works(node: Any) -> bool:
        has, left = node["Resources"], free.get(node["NodeID"], {})
        return _HEAD in has or any(left.get(kind, 0) < has.get(kind, 0) for kind in ("CPU", "GPU"))

    return sum(node["Alive"] and works(node) for node in ray.nodes()), context.policy_state


def is_over(job_id: str) -> bool:
    """Tell whether a job's driver has ended, or its node is lost."""
    return any(job["JobID"] == job_id and job["IsDead"] for job in jobs())


def wait_until_free(app_name: str) -> None:
    """Refuse to take the place of a server that somebody runs; one whose driver was killed is about to end.

    Raises:
        ValueError: There is one, and it stays.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while (owner := find_owner(app_name)) is not None:
        if time.monotonic() > deadline:
            raise ValueError(
                f"this cluster serves {owner.name} already, at {owner.url}; stop that server, or take its "
                "place (vlmray serve --replace), or ask it (vlmray benchmark --endpoint)"
            )
        time.sleep(_PERIOD_S)


def stop_running(app_name: str, timeout_s: float) -> None:
    """Stop a server, if there is one, whoever runs it, once what is in progress is answered."""
    if find_owner(app_name) is not None:
        asked: Any = serve.get_app_handle(app_name).drain_all.remote(timeout_s)
        asked.result(timeout_s=timeout_s + 2 * _PATIENCE_S)
        serve.shutdown()


def find_owner(app_name: str) -> Owner | None:
    """Return who runs a server; None where nobody does, any more."""
    try:
        if app_name not in serve.status().applications:
            return None
        asked: Any = serve.get_app_handle(app_name).owner.remote()
        owner: Owner = asked.result(timeout_s=_PATIENCE_S)
    except (RayServeException, RayError, TimeoutError):  # it ends, or never began
        return None
    return None if owner.job_id is not None and is_over(owner.job_id) else owner
