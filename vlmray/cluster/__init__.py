"""The Ray cluster: connect to it, divide what it has, and say what is awaited and what went wrong.

connection -> resources -> plans -> waiting; causes
"""

from vlmray.cluster.causes import root_cause
from vlmray.cluster.connection import connect, driver_node
from vlmray.cluster.plans import ReplicaPlan, WorkerPlan, plan_replicas, plan_workers
from vlmray.cluster.resources import cpus_per_task
from vlmray.cluster.waiting import Asked, Waiting, saying_what_is_awaited, tell_if_taken

__all__ = [
    "Asked", "ReplicaPlan", "Waiting", "WorkerPlan", "connect", "cpus_per_task", "driver_node",
    "plan_replicas", "plan_workers", "root_cause", "saying_what_is_awaited", "tell_if_taken",
]  # fmt: skip
