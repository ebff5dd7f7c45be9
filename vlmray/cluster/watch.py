"""Notice that the head of the cluster is gone, or this machine's own part in it, and say so.

Without either Ray ends the process in the end, from native code and without a word.
"""

from __future__ import annotations

import os
import sys
import threading
import time

import ray

from vlmray.cluster.resources import is_open, raylet_address

_PERIOD_S = 2.0
_RAY_GIVES_UP_S = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60"))  # noqa: SIM112
_LAST_MOMENT_S = 10.0


def watch_cluster() -> None:
    """Watch head and node of the cluster that this process has joined, in a thread, while it is in it."""
    head = _joined()
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    threading.Thread(
        target=_watch, args=(head, raylet_address(node)), daemon=True, name="watch-cluster"
    ).start()


def _joined() -> str | None:
    """Return the address of the head of the cluster that this process is in now."""
    return ray.get_runtime_context().gcs_address if ray.is_initialized() else None


def _watch(head: str, raylet: str) -> None:
    """Wait until one of the two is gone for as long as Ray would put up with it, and end the process then.

    A process that has left the cluster, for none or for another one, has nothing to do with it any more.
    """
    limits = {
        # A head that keeps its state outside (on Kubernetes) comes back; Ray waits for it for a while.
        head: (f"the head of the Ray cluster at {head}", max(0.0, _RAY_GIVES_UP_S - _LAST_MOMENT_S)),
        raylet: ("Ray on this machine", 2 * _PERIOD_S),
    }
    seen = dict.fromkeys(limits, time.monotonic())
    while _joined() == head:
        for address, (what, patience_s) in limits.items():
            if is_open(address):
                seen[address] = time.monotonic()
            elif time.monotonic() - seen[address] > patience_s and _joined() == head:
                _leave(f"{what} is gone; what was finished is kept, run the job again on a cluster")
        time.sleep(_PERIOD_S)


def _leave(message: str) -> None:
    # Nothing of Ray answers any more, so nothing that would want to say goodbye to it may run.
    print(f"\nerror: {message}", file=sys.stderr, flush=True)
    os._exit(1)
