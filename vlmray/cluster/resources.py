"""What the nodes of the cluster have, and what it could start."""

from __future__ import annotations

from pathlib import Path

import ray
import yaml

_BOOTSTRAP_CONFIG = Path("~/ray_bootstrap_config.yaml")


def cpus_per_task() -> float:
    """Return the CPUs that a task of the other stages may ask for: replicas always leave that much."""
    return min(1.0, present("CPU") / 2) or 1.0


def present(resource: str) -> float:
    """Return what the cluster has of a resource now."""
    return ray.cluster_resources().get(resource, 0)


def reachable(resource: str) -> float:
    """Return what the cluster has of a resource, or could start if it autoscales."""
    return max(present(resource), startable(resource))


def startable(resource: str) -> float:
    """Return what the autoscaler may start, by the config that `ray up` leaves on the head node.

    No call of Ray's answers this for clusters of the launcher before a node of the type runs.
    """
    try:
        config = yaml.safe_load(_BOOTSTRAP_CONFIG.expanduser().read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return 0
    limit = config.get("max_workers", 0)
    return sum(
        node.get("resources", {}).get(resource, 0) * min(node.get("max_workers", limit), limit)
        for node in config.get("available_node_types", {}).values()
    )


def node_cpus() -> float:
    """Return the CPUs of the node that has most of them."""
    return max((node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]), default=1)


def is_alive(node_id: str) -> bool:
    """Tell whether a node is there; one that was lost is missed only some seconds later."""
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())
