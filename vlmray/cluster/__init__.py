"""The Ray cluster: connect to it, divide what it has, and say what is awaited and what went wrong.

resources -> placement -> waiting -> plans -> preview; connection; ending; causes
"""

from vlmray.cluster.causes import root_cause
from vlmray.cluster.connection import connect, driver_node
from vlmray.cluster.ending import ending_actors
from vlmray.cluster.placement import place
from vlmray.cluster.plans import ReplicaPlan, WorkerPlan, plan_clients, plan_replicas, plan_workers
from vlmray.cluster.preview import preview
from vlmray.cluster.resources import cpus_per_task, dead, gone, is_alive
from vlmray.cluster.waiting import Asked, Waiting, saying_what_is_awaited, tell_if_taken

__all__ = [
    "Asked", "ReplicaPlan", "Waiting", "WorkerPlan", "connect", "cpus_per_task", "dead", "driver_node",
    "ending_actors", "gone", "is_alive", "place", "plan_clients", "plan_replicas", "plan_workers",
    "preview", "root_cause", "saying_what_is_awaited", "tell_if_taken",
]  # fmt: skip
