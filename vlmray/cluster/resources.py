"""What the nodes of the cluster have, and which it could start."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml

_BOOTSTRAP_CONFIG = Path("~/ray_bootstrap_config.yaml")
_MOST_UNTIL_ANSWER_S = 3.0
_MOST_UNTIL_DEAD_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine of the cluster, or one that it could start."""

    name: str
    """Its address; of one that could be started, its type."""

    resources: Mapping[str, float]

    def has(self, resource: str) -> float:
        """Return how much it has of a resource, in use or not."""
        return self.resources.get(resource, 0)


def cpus_per_task() -> float:
    """Return the CPUs that a task of the other stages may ask for: replicas always leave that much."""
    return min(1.0, max(_sizes("CPU"), default=0) / 2) or 1.0


def node_cpus() -> float:
    """Return the CPUs of the node that has most of them."""
    return max(_sizes("CPU"), default=1)


def present(resource: str) -> float:
    """Return what the cluster has of a resource now."""
    return sum(_sizes(resource))


def reachable(resource: str) -> float:
    """Return what the cluster has of a resource, or could start if it autoscales."""
    return max(present(resource), startable(resource))


def startable(resource: str) -> float:
    """Return what the nodes have of a resource that the autoscaler may start, running ones included."""
    return sum(node.has(resource) for node in startable_nodes())


def present_nodes() -> list[Node]:
    """Return the nodes that are there now."""
    return [
        Node(name=node["NodeManagerAddress"], resources=node["Resources"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def dead(node_ids: Collection[str]) -> set[str]:
    """Return which of these nodes the cluster has declared dead."""
    return set(node_ids) - {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def gone(node_ids: Collection[str]) -> set[str]:
    """Return which of these nodes are no more, once the cluster knows it too.

    Those who ask have just lost what ran there, which they hear of before the node is declared dead. What is
    planned meanwhile would count on it.
    """
    deadline = time.monotonic() + _MOST_UNTIL_DEAD_S
    lost = (node for node in ray.nodes() if node["NodeID"] in node_ids)
    silent = {node["NodeID"] for node in lost if not is_open(raylet_address(node))}
    while silent - dead(silent) and time.monotonic() < deadline:
        time.sleep(0.1)
    return dead(node_ids)


def raylet_address(node: Mapping[str, Any]) -> str:
    """Return where the raylet of a node listens, of those that `ray.nodes` gives."""
    return f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"


def is_open(address: str) -> bool:
    """Tell whether something listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_MOST_UNTIL_ANSWER_S):
            return True
    except OSError:
        return False


def startable_nodes() -> list[Node]:
    """Return all nodes that the autoscaler may start, by the config that `ray up` leaves on the head node.

    No call of Ray's answers this for clusters of the launcher before a node of the type runs, and none for
    those of KubeRay.
    """
    try:
        config = yaml.safe_load(_BOOTSTRAP_CONFIG.expanduser().read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return []
    limit = config.get("max_workers", 0)
    kinds = {
        name: kind
        for name, kind in config.get("available_node_types", {}).items()
        if name != config.get("head_node_type")
    }
    nodes = [node for name, kind in kinds.items() for node in _nodes_of(name, kind, limit)]
    # Which of them fill up the limit depends on what is asked for; GPUs are what jobs ask for first.
    return sorted(nodes, key=lambda node: (-node.has("GPU"), -node.has("CPU")))[:limit]


def is_alive(node_id: str) -> bool:
    """Tell whether a node is there; one that was lost is missed only some seconds later."""
    return not dead([node_id])


def may_grow() -> bool:
    """Tell whether nodes may come that nobody here can count: KubeRay's autoscaler tells no one how many."""
    return "KUBERAY_GEN_RAY_START_CMD" in os.environ


def _nodes_of(name: str, kind: Mapping[str, Any], limit: int) -> Iterable[Node]:
    count = min(kind.get("max_workers", limit), limit)
    return [Node(name=name, resources=kind.get("resources", {}))] * count


def _sizes(resource: str) -> list[float]:
    """Return what each node has of a resource, those without it left out."""
    return [size for node in present_nodes() if (size := node.has(resource))]
