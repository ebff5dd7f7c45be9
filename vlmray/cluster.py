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
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.data  # noqa: F401  # sets up the logger that is silenced below
import yaml
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.utils import read_ray_address
from ray._raylet import GcsClient  # type: ignore[attr-defined]

from vlmray.errors import OptionError, RunError, one_line

_LOG = logging.getLogger(__name__)
_BOOTSTRAP_CONFIG = Path("~/ray_bootstrap_config.yaml")
_HOST_PORT = re.compile(r"[\w.\-\[\]:]+:\d+")
_HTTP2_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # a frame without any; the fourth byte is its kind
_NOBODY = "no Ray cluster answers there; correct it or unset it"
_WRONG_TOKEN = (
    "the cluster wants another token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to what it was started with"
)

_FRAME = re.compile(r"^( +)File ", re.MULTILINE)
_OURS = re.compile(r"^vlmray\.[\w.]+Error: ")  # as a traceback says whose error it is
_ADVICE = re.compile(
    r"\s+(?=Failed to .+ after \d+/\d+ attempts|To change retry attempts|For further information visit|"
    r"This looks like an AWS S3 permissions error|Some common causes include)"
)
"""What libraries put behind the cause."""

_WRAPPED = "The above exception was the direct cause of the following exception:"
_MOST_CHARS = 600

_PATIENCE_S = 5.0

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
        ValueError: no cluster answers at RAY_ADDRESS, or it wants another token.
        RunError: Ray does not start.
    """
    if ray.is_initialized():
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    address = _address()
    try:
        _init(address, log_level)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        problem = "does not start" if address == "local" else f"at {address} cannot be joined"
        raise RunError(f"Ray {problem}: {one_line(error)}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's handler would end the process midway


def _init(address: str, log_level: str) -> None:
    if log_level == "DEBUG":
        ray.init(address=address, include_dashboard=False)
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
            address=address,
            include_dashboard=False,  # of a cluster started here, which nobody would look at
            logging_level=logging.ERROR,
            log_to_driver=False,
        )


# ---------------------------------------------------------------------------------------------
# Addresses
# ---------------------------------------------------------------------------------------------


def _address() -> str:
    """Return the address for `ray.init`, checked: it waits half a minute for a cluster that is gone."""
    given = os.environ.get("RAY_ADDRESS", "").strip()
    if given == "local":
        return given
    # What `ray start` wrote; a killed cluster leaves it behind.
    address = read_ray_address() if given in ("", "auto") else given
    problem = _objection(address) if address else "no cluster runs on this machine"
    if address and problem is None:
        return address
    if given:
        raise ValueError(f"RAY_ADDRESS {given}: {problem}")
    if problem == _WRONG_TOKEN:
        raise ValueError(f"the Ray cluster of this machine ({address}): {problem}, or RAY_ADDRESS=local")
    return "local"


def _objection(address: str) -> str | None:
    """Tell what is wrong with an address; None where a cluster answers that lets this process in."""
    if not _HOST_PORT.fullmatch(address):
        return "expected HOST:PORT of a cluster's head node, auto or local; correct it or unset it"
    if not _speaks_http2(address):
        return _NOBODY
    try:
        with _silent_stderr():
            _greet(address)
    except ray.exceptions.AuthenticationError:
        return _WRONG_TOKEN
    except ray.exceptions.RayError as error:
        return f"{_NOBODY} ({one_line(error)})"
    return None


def _greet(address: str) -> None:
    """Ask a cluster for its name, with the token of this machine where it wants one."""
    try:
        GcsClient(address=address)
    except ray.exceptions.AuthenticationError:
        # Ray itself takes it only for a cluster that it found without being told the address.
        logging.getLogger("ray").setLevel(logging.ERROR)
        if "RAY_AUTH_MODE" in os.environ or not maybe_enable_token_auth_if_token_available(False):
            raise
        GcsClient(address=address)


def _speaks_http2(address: str) -> bool:
    """Tell whether what listens there may be Ray, which is asked in HTTP/2."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=3) as connection:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _HTTP2_SETTINGS)
            uses_tls = os.environ.get("RAY_USE_TLS", "0") not in ("", "0")
            return uses_tls or connection.recv(9)[3:4] == _HTTP2_SETTINGS[3:4]
    except (OSError, OverflowError, UnicodeError):
        return False


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what native code writes to stderr meanwhile; exceptions pass."""
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
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
                f"{asked:g} {kind}s, and {free.get(kind, 0):g} of {_present(kind):g} are free"
                for kind, asked in _asked(cpus, gpus)
            )
            _LOG.warning("waiting until others are done: the job asks for %s", " and ".join(found))
            return
        time.sleep(0.1)


def _asked(cpus: float, gpus: float) -> list[tuple[str, float]]:
    return [(kind, asked) for kind, asked in (("CPU", cpus), ("GPU", gpus)) if asked]


def root_cause(error: BaseException) -> str:
    """Name what went wrong in a worker, in one line, without the layers that carried it here."""
    failures = getattr(error, "worker_failures", None)  # of Ray Train, by rank
    if failures:
        error = failures[min(failures)]
    told = str(error)
    while (cause := getattr(error, "cause", None)) is not None:
        # Ray Data wraps what was raised, and what came before does not survive the way here but as text.
        told = (
            told.rpartition(_WRAPPED)[0]
            if isinstance(cause, ray.exceptions.UserCodeException)
            else str(cause)
        )
        error = cause
    raised = _raised_last(told)
    text = one_line(_ADVICE.split(raised or told)[0] or type(error).__name__, _MOST_CHARS)
    if "No space left on device" in text:
        return f"no space left on device: free some and run again ({text})"
    if isinstance(error, OptionError | RunError) or raised:
        return _OURS.sub("", text)
    return f"{type(error).__name__}: {text}"


def _raised_last(text: str) -> str:
    """Return what was raised last in a traceback, which the error of an actor that did not start has in it.

    Behind a frame's lines of code it is what is indented no deeper than the word `File`.
    """
    frames = list(_FRAME.finditer(text))
    if not frames:
        return ""
    indentation = len(frames[-1][1])
    lines = text[frames[-1].end() :].splitlines()[1:]
    begins = (
        n for n, line in enumerate(lines) if line.strip() and len(line) - len(line.lstrip()) < indentation
    )
    return "\n".join(lines[next(begins, len(lines)) :])


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
