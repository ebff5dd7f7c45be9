"""The answers of a run, for all of its replicas.

    replica -> SharedAnswers -> actor with the Answers, on the driver's machine

One replica alone has them itself, unless they are to be kept: a cache may lie on the driver's machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from vlmray import cluster
from vlmray.inference.plan import InferenceRun
from vlmray.inference.reuse.answers import Answers, Found
from vlmray.inference.reuse.facts import model_facts
from vlmray.inference.reuse.folder import Answer, AnswerFolder


@dataclass(frozen=True, slots=True)
class SharedAnswers:
    """Answers that an actor has: a call for each chunk, there and back."""

    actor: Any

    def find(self, keys: Iterable[bytes]) -> dict[bytes, Found]:
        """Return what is known of some keys."""
        found: dict[bytes, Found] = ray.get(self.actor.find.remote(list(keys)))
        return found

    def keep(self, answers: Mapping[bytes, Answer]) -> None:
        """Take up what was answered."""
        ray.get(self.actor.keep.remote(dict(answers)))

    def problems(self) -> str | None:
        """Say what could not be read or written."""
        problems: str | None = ray.get(self.actor.problems.remote())
        return problems


def start_answers(run: InferenceRun, replicas: cluster.ReplicaPlan, num_chunks: int) -> SharedAnswers | None:
    """Start the actor that has the answers of a run; None where each replica has its own.

    If it is lost it is started again, and knows what the cache has.
    """
    is_alone = min(replicas.max_replicas, num_chunks) == 1
    if run.config.engine == "fake" or (is_alone and run.cache is None):
        return None
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Answers)
    folder = _folder(run, replicas)
    return SharedAnswers(actor.options(label_selector=cluster.driver_node()).remote(folder))


def served_answers(run: InferenceRun) -> Answers | None:
    """Return the answers of a model behind a server, for a process that asks alone; None as of a replica."""
    config = run.config
    if config.engine == "fake":
        return None
    if run.cache is None or config.engine == "openai":
        return Answers(_folder(run))
    plan = cluster.plan_replicas(config.replica_range(), config.gpus_per_replica, config.cards)
    return Answers(_folder(run, plan, served=True))


def _folder(
    run: InferenceRun, replicas: cluster.ReplicaPlan | None = None, *, served: bool = False
) -> AnswerFolder | None:
    """Return where the answers of a run's model are kept, if they are."""
    device = "GPU" if replicas is not None and replicas.num_gpus else "CPU"
    return run.cache and run.cache.of_model(model_facts(run.config, run.model, device=device, served=served))
