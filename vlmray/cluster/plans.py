"""Divide what the cluster has among model replicas or training workers.

Replicas never take all CPUs: Ray Data deadlocks when the actors of one stage leave no CPU for the tasks of
another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vlmray.cluster.placement import Bundle, largest_share, place, rooms, share_cpus
from vlmray.cluster.resources import (
    Node,
    cpus_per_task,
    may_grow,
    node_cpus,
    present,
    present_nodes,
    reachable,
    startable_nodes,
)
from vlmray.cluster.waiting import Asked
from vlmray.errors import OptionError

MODEL_ON_CPU = {
    "env_vars": {
        # What the model frees it soon asks for again (see `keep_freed_memory` of the engine, which comes
        # too late for the threads that Ray starts before).
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
        # Threads of the model that wait for each other shall not keep a core from everything else.
        "GOMP_SPINCOUNT": "1000",
    }
}
"""Runtime environment of a process that holds a model, or starts those that do, on CPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPlan:
    """How many model replicas to start and what each asks Ray for."""

    min_replicas: int
    max_replicas: int
    num_gpus: float
    num_cpus: float

    num_threads: int | None
    """CPU threads of the model in each replica; None on a GPU, where torch's default will do."""

    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    """Environment of each replica, beside the job's."""

    def asked(self, actors: str, count: int | None = None, *, is_served: bool = False) -> Asked:
        """Return what has to be there, in actors of some class; `count` of them where fewer do."""
        count = self.min_replicas if count is None else count
        return Asked(
            count=count,
            least=count if is_served else 1,  # Ray Serve has started when all are there
            name="replica",
            resources={"GPU": self.num_gpus, "CPU": self.num_cpus},
            actors=actors,
            option="num_replicas",
            is_served=is_served,
            is_pool=not is_served,
        )

    @property
    def memory_fraction(self) -> float:
        """Share of a GPU's memory that a replica may take: Ray divides cards, but not their memory."""
        return self.num_gpus if 0 < self.num_gpus < 1 else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlan:
    """How many training workers to start and what each asks Ray for."""

    num_workers: int
    """The most that train at a time; their number times their batch is what a step trains."""

    min_workers: int
    """The fewest that go on without the others; as many as `num_workers` where the number is fixed."""

    resources: dict[str, float]
    cpus_per_task: float
    """What a task that reads and decodes for them may ask for."""

    num_threads: int | None
    """CPU threads of each worker; None on a GPU, where torch's default will do."""

    @property
    def asked(self) -> Asked:
        """What has to be there."""
        return Asked(
            count=self.min_workers,
            least=self.min_workers,
            name="worker",
            resources=self.resources,
            actors="RayTrainWorker",
            option="num_workers",
        )


def plan_replicas(
    replica_range: tuple[int, int] | None, gpus_per_replica: float | None, cards: int = 1
) -> ReplicaPlan:
    """Divide the cluster among replicas.

    Args:
        replica_range: Smallest and largest number asked for; None: one per GPU, or one without GPUs.
        gpus_per_replica: GPUs of each; None: `cards` where the cluster has or can start GPUs, else 0.
        cards: GPUs of one node that have to share a model.

    Raises:
        ValueError: the cluster neither has nor can start the GPUs that the smallest number needs.
    """
    total_gpus = reachable("GPU")
    default = float(cards if cards > 1 and total_gpus else min(1, total_gpus))
    num_gpus = default if gpus_per_replica is None else gpus_per_replica
    fitting = max(1, int(total_gpus / num_gpus)) if num_gpus else 1
    low, high = replica_range or (max(1, min(fitting, int(present("GPU") / (num_gpus or 1)))), fitting)
    if num_gpus and low and not _have_room([{"GPU": num_gpus}] * low):
        most = max(node.has("GPU") for node in (*present_nodes(), *startable_nodes()))
        if cards > max(1, most):
            raise OptionError(
                "tensor_parallel_size",
                f"and --pipeline_parallel_size need {cards} GPUs on one node, and the largest has {most:g}",
                "lower them",
            )
        parts = f", {most:g} on a node" if num_gpus * low <= total_gpus else ""
        raise OptionError(
            "gpus_per_replica",
            f"{num_gpus:g} for {low} replica(s) needs {num_gpus * low:g} GPUs and the cluster has "
            f"{total_gpus:g}{parts}",
            "lower --num_replicas, or pass --gpus_per_replica 0 to use CPUs",
        )
    if num_gpus:
        # A GPU replica waits for its GPU most of the time; asking for no CPU leaves all to the other stages.
        return ReplicaPlan(
            min_replicas=low, max_replicas=high, num_gpus=num_gpus, num_cpus=0, num_threads=None
        )
    sizes = [node.has("CPU") for node in present_nodes()]
    return ReplicaPlan(
        min_replicas=low,
        max_replicas=high,
        num_gpus=0,
        num_cpus=min(1.0, largest_share(rooms(sizes, cpus_per_task()), high)),
        # Threads that wait for a core that others have taken make the rest wait with them.
        num_threads=max(1, int(node_cpus() // high)),
        runtime_env=MODEL_ON_CPU,
    )


def plan_clients(replica_range: tuple[int, int] | None) -> ReplicaPlan:
    """Place replicas that only ask a server: one unless more are asked for, and no GPUs."""
    replicas = plan_replicas(replica_range or (1, 1), gpus_per_replica=0)
    return replace(replicas, num_threads=None, runtime_env={})


def plan_workers(worker_range: tuple[int, int] | None) -> WorkerPlan:
    """Divide the nodes among training workers: a GPU each, or a share of a node's CPUs where there are none.

    Args:
        worker_range: Smallest and largest number asked for; None: one per GPU, or two on CPUs.

    Raises:
        ValueError: the nodes that there are, or could be started, do not hold the smallest number.
    """
    kind = "GPU" if reachable("GPU") >= 1 else "CPU"
    here, all_started = present_nodes(), startable_nodes()
    nodes = max(here, all_started, key=lambda nodes: _num_whole(kind, nodes))
    most = _num_whole(kind, nodes)
    low, high = worker_range or (_default_workers(kind, most),) * 2
    if low > most and not (kind == "GPU" and may_grow()):
        coming = f"and may start {most}" if nodes is all_started else "with no more to start"
        raise OptionError(
            "num_workers",
            f"{low} needs {low} {kind}s and the cluster has {_num_whole(kind, here)}, {coming}",
            "lower --num_workers",
        )
    if kind == "GPU":
        return WorkerPlan(
            num_workers=high,
            min_workers=low,
            resources={"GPU": 1},
            cpus_per_task=cpus_per_task(),
            num_threads=None,
        )
    sizes = [node.has("CPU") for node in nodes if node.has("CPU")]
    per_worker, per_task = share_cpus(sizes, min(high, most), high)
    resources = {"CPU": per_worker}
    holders = Counter(map(id, place([resources] * min(high, most), nodes) or ()))
    num_threads = min(int((node.has("CPU") - 1) // holders[id(node)]) for node in nodes if holders[id(node)])
    return WorkerPlan(
        num_workers=high,
        min_workers=low,
        resources=resources,
        cpus_per_task=per_task,
        num_threads=max(1, num_threads),
    )


def _have_room(bundles: Sequence[Bundle]) -> bool:
    """Tell whether nodes that there are, or that could be started, hold them."""
    return may_grow() or any(place(bundles, nodes) for nodes in (present_nodes(), startable_nodes()))


def _default_workers(kind: str, most: int) -> int:
    return max(1, int(present("GPU") or most) if kind == "GPU" else min(2, most))


def _num_whole(kind: str, nodes: Sequence[Node]) -> int:
    """Return how many workers with one of a resource the nodes hold."""
    return sum(int(node.has(kind)) for node in nodes)
