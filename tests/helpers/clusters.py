"""Clusters of several nodes on this machine, whose nodes come and go."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

from ray.cluster_utils import Cluster

NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}
"""Environment of what starts or joins such a cluster."""


@contextlib.contextmanager
def cluster_of(*nodes: dict[str, Any], head: dict[str, Any] | None = None) -> Iterator[Cluster]:
    """A cluster of a head, without CPUs unless told, and nodes such as `{"num_cpus": 2, "num_gpus": 1}`.

    GPUs are nominal. `cluster.add_node(num_cpus=2)` starts one more, and `lose(cluster, node)` kills one. It
    lies in a folder of its own, or jobs of other tests would find and join it as this machine's.
    """
    with (
        tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder,
        mock.patch.dict(os.environ, {**NO_TOKEN, "RAY_TMPDIR": folder}),
    ):
        cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **(head or {})}
        )
        try:
            for node in nodes:
                cluster.add_node(**node)
            yield cluster
        finally:
            cluster.shutdown()


def lose(cluster: Cluster, node: Any) -> None:
    """Take a node away as a spot market does: its raylet is killed, and with it all it runs."""
    cluster.remove_node(node, allow_graceful=False)


def joining(cluster: Cluster) -> dict[str, str]:
    """The environment of a process whose job is to run on the cluster."""
    return {**NO_TOKEN, "RAY_ADDRESS": cluster.address}
