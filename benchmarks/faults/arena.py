"""A cluster of several nodes on this machine, whose processes and nodes are killed and come back."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from ray.cluster_utils import Cluster

from benchmarks.faults.traces import Traces, descendants, titles, wait_until_empty

_JOBS = Path(__file__).resolve().parents[2] / "jobs"
_AWAY_S = (1.0, 8.0)
"""How long a node stays away that was taken away."""


class Arena:
    """A head without CPUs, and nodes that come and go. A context manager: behind it, nothing should be left.

    Everything lies in one folder, that of Ray and of `TMPDIR` included.

    Args:
        rng: Draws the victims.
        num_nodes: Nodes beside the head.
        cpus_per_node: CPUs that each of them says it has.

    Attributes:
        folder: Where jobs may write; `kills.log` in it says when what was killed.
        traces: What there was before.
        kills: What was killed so far, by kind.
    """

    def __init__(self, rng: random.Random, num_nodes: int = 2, cpus_per_node: int = 2) -> None:
        self.kills: Counter[str] = Counter()
        self.folder = Path(tempfile.mkdtemp(prefix="chaos", dir="/tmp"))  # short: sockets lie in it
        (self.folder / "tmp").mkdir()
        self.traces = Traces(self.folder / "tmp")
        self._rng = rng
        self._num_nodes = num_nodes
        self._node = {"num_cpus": cpus_per_node}
        self._due: list[float] = []
        self._environment = mock.patch.dict(
            os.environ,
            {
                "RAY_AUTH_MODE": "disabled",
                "RAY_TMPDIR": str(self.folder),
                "TMPDIR": str(self.folder / "tmp"),
                "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "torch"),  # meant to stay
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
            },
        )

    def __enter__(self) -> Arena:
        self._environment.start()
        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        for _ in range(self._num_nodes):
            self._cluster.add_node(**self._node)
        return self

    def __exit__(self, *error: object) -> None:
        self._cluster.shutdown()
        self._environment.stop()

    def start(self, job: str, options: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a job's driver on the cluster; what it says is appended to a file."""
        command = [sys.executable, str(_JOBS / f"{job}.py"), *options]
        with log.open("ab") as output:
            env = {**os.environ, "RAY_ADDRESS": self._cluster.address}
            return subprocess.Popen(command, env=env, stdout=output, stderr=output)

    def kill(self, kind: str, title: str, driver: subprocess.Popen[bytes]) -> bool:
        """Kill one of a kind, as `kill -9` does; return whether there was any.

        Args:
            kind: `node` takes a node away with all that runs on it, unless one is away already; `driver`
                kills the job's own process.
            title: What Ray's processes of another kind are called.
            driver: The job's process.
        """
        if kind == "driver":
            driver.kill()
            driver.wait()
        elif kind == "node":
            nodes = sorted(self._cluster.worker_nodes, key=lambda node: node.unique_id)
            if len(nodes) < self._num_nodes:
                return False
            self._cluster.remove_node(self._rng.choice(nodes), allow_graceful=False)
            self._due.append(time.monotonic() + self._rng.uniform(*_AWAY_S))
        elif victims := sorted(descendants(title), key=lambda process: process.pid):
            self._rng.choice(victims).kill()
        else:
            return False
        self.kills[kind] += 1
        with (self.folder / "kills.log").open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%H:%M:%S')} {kind}\n")
        return True

    def tend(self) -> None:
        """Bring back nodes whose time has come."""
        now = time.monotonic()
        for _ in [due for due in self._due if due <= now]:
            self._cluster.add_node(wait=False, **self._node)
        self._due = [due for due in self._due if due > now]

    def staying(self, of: Sequence[str]) -> list[str]:
        """Return the processes with these titles that do not leave the cluster, although their job has."""
        return wait_until_empty(lambda: [name for title in of for name in titles(descendants(title))])

    def clear(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder)
