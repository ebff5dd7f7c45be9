"""A replica without Ray: what it gives the engine, and what it asks the claims of a run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.nvml import Card, installed_nvml
from helpers.results import open_folder
from helpers.rows import TASK, make_image
from vlmray import cluster
from vlmray.cluster import ReplicaPlan, plans, resources
from vlmray.cluster.resources import Node
from vlmray.config import InferConfig
from vlmray.engines.base import DeadEngineError
from vlmray.engines.fake import FakeEngine
from vlmray.errors import OptionError, RunError
from vlmray.inference import replica, stages
from vlmray.inference.claims import Claims, Holder
from vlmray.inference.replica import Replica
from vlmray.inference.result_folder import RESULT_SCHEMA, ResultFolder, pick
from vlmray.inference.reuse.answers import Answers
from vlmray.inference.stages import prepare_rows
from vlmray.inference.timeline import Span, Timeline
from vlmray.schema import Row

PLAN = ReplicaPlan(min_replicas=1, max_replicas=1, num_gpus=1, num_cpus=0, num_threads=None)
DEAD = Holder("died", "node")


class Handle:
    """Claims as an actor's handle: called at once, in order."""

    def __init__(self, folder: ResultFolder) -> None:
        self.claims = Claims(lambda node: True)
        self.folder = folder
        self.cards: list[str] = []
        """That Ray gives to each replica."""

        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, method: str) -> Any:
        def call(*args: Any) -> Any:
            self.calls.append((method, *(arg for arg in args if isinstance(arg, str))))
            return getattr(self.claims, method)(*args)

        return SimpleNamespace(remote=call)


@pytest.fixture
def handle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Handle:
    handle = Handle(open_folder(tmp_path))
    context = SimpleNamespace(
        get_actor_id=lambda: "actor", get_node_id=lambda: "node",
        get_accelerator_ids=lambda: {"GPU": handle.cards},
    )  # fmt: skip
    monkeypatch.setattr(replica.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(replica.ray, "get", lambda result: result)
    return handle


def load(handle: Handle, model_id: str = "fake") -> Replica:
    config = InferConfig(engine="fake", model_id=model_id, sample_slices="[:]")
    return Replica(config, PLAN, TASK, handle, handle.folder)


def chunk() -> list[Row]:
    rows: list[Row] = [
        {"sample_id": f"test-{at:06d}", "question": "?", "choices": [], "answers": [], "error": None,
         "images": [make_image(at)], "image_urls": [None]}
        for at in range(4)
    ]  # fmt: skip
    rows[2]["error"] = "broken"
    return prepare_rows(rows, TASK)


def answer(found: Replica) -> list[tuple[str | None, str | None]]:
    spans: list[Span] = []
    rows = found.answer(chunk(), spans)
    assert [span.stage for span in spans] == ["load", "generate"]
    return [(row.get("prediction"), row["error"]) for row in rows]


@pytest.mark.parametrize(("gpus", "fraction"), [(0.25, 0.25), (1, 1.0), (2, 1.0), (0, 1.0), (None, 1.0)])
def test_replicas_that_share_a_card_share_its_memory(
    gpus: float | None, fraction: float, handle: Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("reachable", "present"):
        monkeypatch.setattr(plans, name, lambda resource: 4.0)
    for module in (plans, resources):
        monkeypatch.setattr(
            module, "present_nodes", lambda: [Node(name="one", resources={"GPU": 4, "CPU": 4})]
        )
    monkeypatch.setattr(plans, "node_cpus", lambda: 4.0)
    plan = cluster.plan_replicas(None, gpus)
    config = InferConfig(sample_slices="[:]", adapter="folder", batch_size=3)
    given: dict[str, Any] = {}
    monkeypatch.setattr(replica, "load_engine", lambda *_, **options: given.update(options))
    Replica(config, plan, TASK, handle, handle.folder)
    assert given == {
        "adapter": "folder", "batch_size": 3, "num_threads": plan.num_threads, "memory_fraction": fraction,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "cards", "gpus"), [([4], 2, 2), ([1, 2], 2, 2), ([1, 1], 1, 1), ([], 2, 0)]
)
def test_cards_that_share_a_model_are_those_of_one_node(
    sizes: list[int], cards: int, gpus: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_nodes(sizes, monkeypatch)
    assert cluster.plan_replicas((1, 1), None, cards).num_gpus == gpus


def test_cards_that_no_node_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_nodes([1, 1], monkeypatch)
    with pytest.raises(OptionError, match=r"^--tensor_parallel_size .* need 2 GPUs on one node, .* has 1"):
        cluster.plan_replicas((1, 1), None, 2)


def set_nodes(gpus: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [Node(name=f"{at}", resources={"GPU": number, "CPU": 4}) for at, number in enumerate(gpus)]
    nodes.append(Node(name="cpu", resources={"CPU": 4}))
    for name in ("reachable", "present"):
        monkeypatch.setattr(plans, name, lambda resource: float(sum(node.has(resource) for node in nodes)))
    for module in (plans, resources):
        monkeypatch.setattr(module, "present_nodes", lambda: nodes)
        monkeypatch.setattr(module, "startable_nodes", lambda: [])
    monkeypatch.setattr(plans, "may_grow", lambda: False)
    monkeypatch.setattr(plans, "node_cpus", lambda: 4.0)


def test_a_chunk_is_claimed_while_it_is_worked_on(handle: Handle) -> None:
    answer(load(handle))
    name = "test-000000"
    calls = [("claim", "actor"), ("release", "actor")]
    assert handle.calls == calls + [(call, name) for call in ("claim", "pause", "claim", "release")]


def test_rows_alone_are_answered_as_together(handle: Handle, monkeypatch: pytest.MonkeyPatch) -> None:
    together = answer(load(handle))
    handle.claims.claim("test-000000", DEAD)
    sizes = []
    generate = FakeEngine.generate
    monkeypatch.setattr(
        FakeEngine, "generate", lambda self, rows, **kwargs: sizes.append(len(rows)) or generate(self, rows)
    )
    assert answer(load(handle)) == together
    assert sizes == [1, 1, 1]


def test_the_third_death_over_a_row_is_the_last(handle: Handle) -> None:
    together = answer(load(handle))
    handle.claims.claim("test-000000", DEAD)
    handle.claims.claim("test-000000", Holder("next", "node"))
    handle.claims.pause("test-000000")
    handle.claims.keep("test-000000", {"sample_id": "test-000000", "prediction": "kept", "error": None})
    assert handle.claims.claim_row("test-000000", "test-000001", Holder("next", "node")) == 1
    assert handle.claims.claim_row("test-000000", "test-000001", Holder("one more", "node")) == 2
    rows = answer(load(handle))
    assert rows[0] == ("kept", None)
    assert rows[1] == (None, "the replica died 3 times while answering it")
    assert rows[2:] == together[2:]


@pytest.fixture
def many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "calls_at_once", lambda engine: 100)


@pytest.mark.usefixtures("many_calls")
def test_a_chunk_that_was_not_alone_is_asked_again_alone_and_then_row_by_row(
    handle: Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = answer(load(handle))
    sizes: list[tuple[int, int]] = []
    generate = FakeEngine.generate

    def count(self: FakeEngine, rows: Any, **kwargs: Any) -> Any:
        others = sum(found._turns._free.acquire(blocking=False) for _ in range(9))
        sizes.append((len(rows), others))
        return generate(self, rows)

    monkeypatch.setattr(FakeEngine, "generate", count)
    for deaths in range(3):
        for number in range(deaths):
            handle.claims.claim("test-000000", Holder(f"{number}", "node"))
        found = load(handle)
        assert answer(found) == together
    assert sizes == [(3, 3), (3, 0), (1, 0), (1, 0), (1, 0)]  # rows, and chunks that had room beside


def test_who_waits_to_be_alone_is_not_overtaken() -> None:
    turns, order = replica.Turns(2), []

    def go(name: str, alone: bool) -> None:
        with turns.take(alone=alone):
            order.append(name)

    with ThreadPoolExecutor(2) as threads:
        with turns.take(alone=False):
            first = threads.submit(go, "alone", True)
            while not turns._gate.locked():
                assert not first.done()
            second = threads.submit(go, "later", False)
            assert not order
        first.result(20)
        second.result(20)
    assert order == ["alone", "later"]


def test_a_replica_ends_without_its_engine(handle: Handle, monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(*_: Any, **__: Any) -> Any:
        raise DeadEngineError("gone")

    def leave(code: int) -> Any:
        raise SystemExit(code)

    monkeypatch.setattr(FakeEngine, "generate", generate)
    monkeypatch.setattr(replica.os, "_exit", leave)
    with pytest.raises(SystemExit):
        answer(load(handle))
    assert handle.claims.claim("test-000000", Holder("next", "node")).num_deaths == 1


def test_what_is_written_is_not_generated_again(handle: Handle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that were lost after a part of them was written: their chunk is asked for once more."""
    found, spans = load(handle), list[Span]()
    rows = [stages.score_row(row, TASK) for row in found.answer(chunk(), spans)]
    stages.save_rows(rows[:2], handle.folder)
    asked: list[str] = []
    generate = FakeEngine.generate
    monkeypatch.setattr(
        FakeEngine,
        "generate",
        lambda self, requests, **kwargs: (
            asked.extend(each.request_id for each in requests) or generate(self, requests)
        ),
    )
    again = [stages.score_row(row, TASK) for row in found.answer(chunk(), spans)]
    assert asked == ["test-000003"]
    assert [pick(row, RESULT_SCHEMA.names) for row in again] == [
        pick(row, RESULT_SCHEMA.names) for row in rows
    ]


def test_what_is_known_is_not_asked_and_still_says_when_the_model_was_loaded(
    handle: Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_asked: list[int] = []
    generate = FakeEngine.generate
    monkeypatch.setattr(
        FakeEngine, "generate", lambda self, rows, **_: num_asked.append(len(rows)) or generate(self, rows)
    )
    known, together = Answers(), []
    for num_deaths in (0, 0, 2):  # the last time row by row
        for number in range(num_deaths):
            handle.claims.claim("test-000000", Holder(f"{number}", "node"))
        found = load(handle)
        assert found._known is None  # as what this engine says depends on the names of rows
        found._known = known
        together.append(answer(found))
    assert together[0] == together[1] == together[2]
    assert num_asked == [3, 0, 0, 0, 0]


def test_each_replica_knows_at_least_its_own_answers(handle: Handle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "load_engine", lambda *_, **__: FakeEngine())
    config, known = InferConfig(sample_slices="[:]", engine="transformers"), Answers()
    assert isinstance(Replica(config, PLAN, TASK, handle, handle.folder)._known, Answers)
    assert Replica(config, PLAN, TASK, handle, handle.folder, known=known)._known is known


def test_a_model_that_kills_whoever_loads_it_is_named(handle: Handle) -> None:
    for process in "abc":
        handle.claims.claim("actor", Holder(process, "node"))
    with pytest.raises(RunError, match="died 3 times while loading the model"):
        load(handle)


def test_a_model_that_was_loaded_once_may_be_lost_as_often_as_it_likes(handle: Handle) -> None:
    for process in "abcd":
        handle.claims.claim("actor", Holder(process, "node"))
        load(handle)


@pytest.mark.parametrize(("watts", "num_readings"), [(400, 4), (None, 0)])
def test_what_a_card_takes_counts_once_for_all_that_share_it(
    watts: int | None, num_readings: int, handle: Handle, tmp_path: Path
) -> None:
    handle.cards, spans = ["0"], []
    with installed_nvml(tmp_path / "nvml", Card("GPU-a", watts)):
        for found in (load(handle), load(handle)):
            found.answer(chunk(), spans)
    timeline = Timeline()
    timeline.add(spans)
    counters = [each.millijoules for span in spans for each in span.readings]
    assert len(counters) == num_readings  # before loading, and behind each chunk
    taken = (max(counters) - min(counters)) / 3.6e9 if counters else None
    assert timeline.energy_kwh == taken
