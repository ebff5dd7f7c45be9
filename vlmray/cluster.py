"""The Ray cluster: connect to it, and divide what it has among model replicas.

The same call serves a laptop, a cluster's head node and a submitted job. Replicas never take all CPUs:
Ray Data deadlocks when the actors of one stage leave no CPU for the tasks of another.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.data
import yaml
from ray._private.utils import read_ray_address

from vlmray.errors import OptionError

_BOOTSTRAP_CONFIG = Path("~/ray_bootstrap_config.yaml")
_HOST_PORT = re.compile(r"[\w.\-\[\]:]+:\d+")

_MISTAKE = f"{OptionError.__module__}.{OptionError.__name__}: "  # as a traceback's last line says it

_MODEL_ON_CPU = {
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

    @property
    def memory_fraction(self) -> float:
        """Share of a GPU's memory that a replica may take: Ray divides cards, but not their memory."""
        return self.num_gpus if 0 < self.num_gpus < 1 else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlan:
    """How many training workers to start and what each asks Ray for."""

    num_workers: int
    resources: dict[str, float]

    num_threads: int | None
    """CPU threads of each worker; None on a GPU, where torch's default will do."""


def connect(log_level: str = "INFO") -> None:
    """Connect to the cluster this process belongs to, or start Ray on this machine.

    RAY_ADDRESS (set inside a submitted job) comes first, then a cluster that `ray start` left running
    on this machine; only when there is neither does Ray start one, which ends with this process.

    Raises:
        ValueError: no cluster answers at RAY_ADDRESS.
    """
    if ray.is_initialized():
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    _init(log_level)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's handler would end the process midway


def _init(log_level: str) -> None:
    if log_level == "DEBUG":
        ray.init(address=_address(), include_dashboard=False)
        return
    # Ray's own messages drown the progress bar: banners, advice, and core-worker lines that name no
    # problem. What goes wrong still reaches the driver, as an exception; all of it is in Ray's log files.
    warnings.filterwarnings("ignore", category=ray.util.annotations.RayDeprecationWarning)
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.CRITICAL)
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with _silent_stderr():  # the core worker announces its log level
        ray.init(
            address=_address(),
            include_dashboard=False,  # of a cluster started here, which nobody would look at
            logging_level=logging.ERROR,
            log_to_driver=False,
        )


def _address() -> str:
    """Return the address for `ray.init`, checked: it waits minutes for a cluster that is gone."""
    given = os.environ.get("RAY_ADDRESS")
    if given and not _HOST_PORT.fullmatch(given):
        return given
    recorded = given or read_ray_address()  # what `ray start` wrote; a killed cluster leaves it behind
    if recorded and _answers(recorded):
        return recorded
    if given:
        raise ValueError(f"RAY_ADDRESS {given}: no Ray cluster answers there; correct it or unset it")
    return "local"


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what native code writes to stderr meanwhile; exceptions pass."""
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def driver_node() -> dict[str, str]:
    """Return the label selector of the node this process runs on."""
    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}


def plan_replicas(replica_range: tuple[int, int] | None, gpus_per_replica: float | None) -> ReplicaPlan:
    """Divide the cluster among replicas.

    Args:
        replica_range: Smallest and largest number asked for; None: one per GPU, or one without GPUs.
        gpus_per_replica: GPUs of each; None: 1 where the cluster has or can start GPUs, else 0.

    Raises:
        ValueError: the cluster neither has nor can start the GPUs that the smallest number needs.
    """
    total_gpus = _most("GPU")
    num_gpus = gpus_per_replica if gpus_per_replica is not None else float(min(1, total_gpus))
    fitting = max(1, int(total_gpus / num_gpus)) if num_gpus else 1
    low, high = replica_range or (max(1, min(fitting, int(_present("GPU") / (num_gpus or 1)))), fitting)
    if num_gpus * low > total_gpus:
        raise OptionError(
            "gpus_per_replica",
            f"{num_gpus:g} for {low} replica(s) needs {num_gpus * low:g} GPUs and the cluster has "
            f"{total_gpus:g}",
            "lower --num_replicas, or pass --gpus_per_replica 0 to use CPUs",
        )
    if num_gpus:
        # A GPU replica waits for its GPU most of the time; asking for no CPU leaves all to the other stages.
        return ReplicaPlan(
            min_replicas=low, max_replicas=high, num_gpus=num_gpus, num_cpus=0, num_threads=None
        )
    total_cpus = _present("CPU")
    return ReplicaPlan(
        min_replicas=low,
        max_replicas=high,
        num_gpus=0,
        num_cpus=min(1.0, max(total_cpus - 1, total_cpus / 2) / high),
        # Threads that wait for a core that others have taken make the rest wait with them.
        num_threads=max(1, int(_node_cpus() // high)),
        runtime_env=_MODEL_ON_CPU,
    )


def plan_workers(num_workers: int | None) -> WorkerPlan:
    """Divide the cluster among training workers: a GPU each, or a share of the CPUs where there are none.

    Args:
        num_workers: Workers asked for; None: one per GPU, or two on CPUs.

    Raises:
        ValueError: the cluster neither has nor can start what so many workers need.
    """
    kind = "GPU" if _most("GPU") >= 1 else "CPU"
    most = int(_most(kind))
    wanted = num_workers or (max(1, int(_present("GPU") or most)) if kind == "GPU" else min(2, most))
    if wanted > most:
        raise OptionError(
            "num_workers",
            f"{wanted} needs {wanted} {kind}s and the cluster has {most}, with no more to start",
            "lower --num_workers",
        )
    if kind == "GPU":
        return WorkerPlan(num_workers=wanted, resources={"GPU": 1}, num_threads=None)
    # The tasks that read and decode need room beside the workers, or both wait for each other.
    share = max(0.01, int(100 * (_present("CPU") - cpus_per_task()) / wanted) / 100)
    per_node = -(-wanted // max(1, sum(node["Alive"] for node in ray.nodes())))
    num_threads = max(1, int((_node_cpus() - 1) // per_node))
    return WorkerPlan(num_workers=wanted, resources={"CPU": share}, num_threads=num_threads)


def cpus_per_task() -> float:
    """Return the CPUs that a task of the other stages may ask for: replicas always leave that much."""
    return min(1.0, _present("CPU") / 2) or 1.0


def root_cause(error: BaseException) -> str:
    """Name what went wrong in a worker, without the layers that carried it here."""
    failures = getattr(error, "worker_failures", None)  # of Ray Train, by rank
    if failures:
        error = failures[min(failures)]
    while (cause := getattr(error, "cause", None)) is not None:
        error = cause
    if isinstance(error, OptionError):
        return str(error)
    # The error of an actor that died while starting is a whole traceback, what was raised last in it.
    lines = str(error).strip().splitlines() or [""]
    return lines[-1].removeprefix(_MISTAKE) if len(lines) > 1 else f"{type(error).__name__}: {lines[0]}"


def _present(resource: str) -> float:
    return ray.cluster_resources().get(resource, 0)


def _most(resource: str) -> float:
    """Return what the cluster has of a resource, or could start if it autoscales."""
    return max(_present(resource), _startable(resource))


def _startable(resource: str) -> float:
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


def _node_cpus() -> float:
    return max((node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]), default=1)
