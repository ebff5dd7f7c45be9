"""What an actor of the generating stage does: hold the model, answer chunks, and outlive those that kill it.

Several threads call a replica: one readies its chunk while the others have the model. A chunk is claimed
while one is at work on it, and answered row by row once a replica died over it (see `claims.py`). Where an
engine answers several chunks at a time, each of them is first asked again alone: another may have killed it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, cast

import ray

from vlmray import cluster
from vlmray.config import InferConfig
from vlmray.engines import calls_at_once, load_engine
from vlmray.engines.base import DeadEngineError, Engine
from vlmray.errors import RunError
from vlmray.inference import stages
from vlmray.inference.claims import MAX_DEATHS, Claims, Holder
from vlmray.inference.endpoint.keeping import Key, engine_options
from vlmray.inference.energy.reading import Meter
from vlmray.inference.result_folder import RESULT_SCHEMA, ResultFolder, pick
from vlmray.inference.reuse.answers import Answers, Known
from vlmray.inference.stages import Task
from vlmray.inference.timeline import Span, Watch
from vlmray.schema import Row

logger = logging.getLogger(__name__)

_MOST_CHUNKS = 4
"""At a time in an engine that mixes them: enough that the end of one, or a slow row, does not idle it."""


def chunks_at_once(engine: str) -> int:
    """Return how many chunks a replica answers at a time."""
    return min(_MOST_CHUNKS, calls_at_once(engine))


def start_claims() -> Any:
    """Start the actor that keeps the claims of a run, on this machine: its loss is the run's anyway."""
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Claims)
    return actor.options(label_selector=cluster.driver_node()).remote(cluster.is_alive)


class Turns:
    """So many at a time, or one alone."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._free = threading.Semaphore(number)
        self._gate = threading.Lock()  # who waits to be alone is not overtaken

    @contextlib.contextmanager
    def take(self, *, alone: bool) -> Iterator[None]:
        """Wait for a turn."""
        taken = self.number if alone else 1
        with self._gate:
            for _ in range(taken):
                self._free.acquire()
        try:
            yield
        finally:
            self._free.release(taken)


def _load_engine(config: InferConfig, task: Task, **options: Any) -> Engine:
    """Load a run's model with its adapter on it, or beside it where rows ask for either."""
    if config.adapter is None or config.engine == "fake" or not task.models:
        return load_engine(config.model_id, config, adapter=config.adapter, **options)
    engine: Any = load_engine(
        config.model_id, config, adapters=[config.adapter], max_adapters=1, **options
    )  # fmt: skip
    engine.load_adapter(stages.ADAPTER, config.adapter)
    return cast(Engine, engine)


class Replica:
    """A model and the turns of those who use it.

    Args:
        config: Which model.
        plan: What it may use.
        task: How questions are asked.
        claims: Handle of the run's `Claims`.
        folder: Where answers are written, later.
        key: Key of the server that answers, where one does.
        known: Knows the answers of all replicas; None: this one knows its own.
    """

    def __init__(
        self,
        config: InferConfig,
        plan: cluster.ReplicaPlan,
        task: Task,
        claims: Any,
        folder: ResultFolder,
        key: Key | None = None,
        known: Known | None = None,
    ) -> None:
        context = ray.get_runtime_context()
        self._task, self._claims, self._folder = task, claims, folder
        # The stand-in for tests answers by the names of rows.
        self._known = None if config.engine == "fake" else known or Answers()
        self._id = context.get_actor_id()
        self._holder = Holder(uuid.uuid4().hex, context.get_node_id())
        self._turns = Turns(chunks_at_once(config.engine))
        self._meter = Meter(context.get_accelerator_ids()["GPU"])
        watch, readings = Watch(), self._meter.read()
        with self._loading():
            self._engine = _load_engine(
                config,
                task,
                batch_size=config.batch_size,
                num_threads=plan.num_threads,
                memory_fraction=plan.memory_fraction,
                **engine_options(config, key),
            )
        self._spans = [watch.span("load", replica=self._id, readings=readings)]

    def answer(self, rows: Sequence[Row], spans: list[Span]) -> list[Row]:
        """Answer a chunk, and add to `spans` when the model worked; without its engine, end this process."""
        try:
            return self._answer(rows, spans)
        except DeadEngineError as error:
            # An actor that dies is started again, and its chunks go to whoever holds a model.
            logger.error("%s; the replica ends and is replaced", error)
            os._exit(1)

    def _answer(self, rows: Sequence[Row], spans: list[Span]) -> list[Row]:
        chunk = rows[0]["sample_id"]
        num_deaths, answers, was_answered = self._ask("claim", chunk, self._holder)
        if was_answered:
            written = self._folder.answered([row["sample_id"] for row in rows])
            rows = [row | written.get(row["sample_id"], {}) for row in rows]
        if num_deaths == 0 or (num_deaths == 1 and self._turns.number > 1):
            turn = self._claimed_turn(chunk, spans, alone=num_deaths > 0)
            rows = stages.generate_rows(rows, self._engine, self._task, turn, self._known)
        else:
            self._claims.pause.remote(chunk)
            with self._turn(spans, alone=True):
                rows = [self._answer_alone(row, chunk, answers) for row in rows]
        self._claims.release.remote(chunk)
        return list(rows)

    def _answer_alone(self, row: Row, chunk: str, answers: dict[str, Row]) -> Row:
        name = row["sample_id"]
        if not stages.is_pending(row):
            return row
        if name in answers:
            return row | answers[name]
        num_deaths = self._ask("claim_row", chunk, name, self._holder)
        if num_deaths >= MAX_DEATHS:
            row["error"] = f"the replica died {num_deaths} times while answering it"
        else:
            (row,) = stages.generate_rows([row], self._engine, self._task, known=self._known)
        self._claims.keep.remote(chunk, pick(row, RESULT_SCHEMA.names))
        return row

    @contextlib.contextmanager
    def _claimed_turn(self, chunk: str, spans: list[Span], *, alone: bool) -> Iterator[None]:
        """Hold the model; a chunk that waits for it is not what others die of."""
        self._claims.pause.remote(chunk)
        with self._turn(spans, alone=alone):
            self._ask("claim", chunk, self._holder)
            yield

    @contextlib.contextmanager
    def _turn(self, spans: list[Span], *, alone: bool) -> Iterator[None]:
        """Hold the model, and note when."""
        with self._turns.take(alone=alone):
            watch, waited_s = Watch(), self._engine.waited_s
            yield
            waited_s = self._engine.waited_s - waited_s
            readings = self._meter.read()
            answered = watch.span("generate", waited_s=waited_s, replica=self._id, readings=readings)
            spans += [*self._spans, answered]
            self._spans = []  # the first chunk says when the model was loaded

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        """See that a model that kills whoever loads it does not do so for ever."""
        num_deaths = self._ask("claim", self._id, self._holder).num_deaths
        if num_deaths >= MAX_DEATHS:
            raise RunError(f"the replica died {num_deaths} times while loading the model")
        yield
        self._claims.release.remote(self._id)

    def _ask(self, method: str, *args: Any) -> Any:
        return ray.get(getattr(self._claims, method).remote(*args))
