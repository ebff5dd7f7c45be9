"""What gateways ask of the cluster: how many there should be, and whether the job they serve for is over.

Serve's controller calls `one_per_node`, which reaches it as a value: it may be without this package.
"""

from __future__ import annotations

from typing import Any

import ray
from ray._private.state import available_resources_per_node, jobs

_HEAD = "node:__internal_head__"


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
