"""Ask the nodes of the cluster what they have that Ray does not know of."""

from __future__ import annotations

import importlib.util

import ray

from vlmray.cluster.connection import connect
from vlmray.cluster.resources import reachable

_PATIENCE_S = 60.0


def find_gpu_objection(package: str, log_level: str) -> str | None:
    """Tell why a package that needs GPUs cannot be used on the cluster; None where it can.

    Nodes that the cluster has yet to start are taken to be as those that it has.
    """
    connect(log_level)
    if not reachable("GPU"):
        return "the cluster has no GPU"
    lacking = _nodes_without(package)
    return f"{', '.join(lacking)} with GPUs lacks it" if lacking else None


def _nodes_without(package: str) -> list[str]:
    """Name the nodes with GPUs that have no such package, or do not answer."""
    ask = ray.remote(num_cpus=0, max_retries=0)(_has)
    asked = {
        ask.options(label_selector={"ray.io/node-id": node["NodeID"]}).remote(package): node
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU")
    }
    answered, _ = ray.wait([*asked], num_returns=len(asked), timeout=_PATIENCE_S) if asked else ([], [])
    return [
        node["NodeManagerAddress"]
        for answer, node in asked.items()
        if answer not in answered or not ray.get(answer)
    ]


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
