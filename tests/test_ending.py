"""What a run has started ends with it, whoever still holds it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from helpers.processes import wait_until
from vlmray import cluster
from vlmray.cluster import ending

pytestmark = pytest.mark.usefixtures("two_cpus")


@pytest.fixture
def no_collection() -> Iterator[None]:
    """As in a process that only waits."""
    gc.disable()
    yield
    gc.enable()


def start() -> Any:
    class Lingering:  # in here, so that it travels as it is
        def greet(self) -> str:
            return "hello"

        def hang(self) -> None:
            threading.Event().wait()

    actor: Any = ray.remote(num_cpus=2, max_restarts=-1)(Lingering).remote()
    assert ray.get(actor.greet.remote()) == "hello"
    return actor


def all_is_free() -> bool:
    return ray.available_resources().get("CPU") == 2


def test_an_actor_that_lies_in_a_cycle_ends_by_itself(
    no_collection: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "_PATIENCE_S", 30)
    with cluster.ending_actors("Lingering"):
        cycle: list[Any] = [start()]
        cycle.append(cycle)
        del cycle
    wait_until(all_is_free, 10)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_PATIENCE_S", "_PATIENCE_AFTER_ERROR_S"):
        monkeypatch.setattr(ending, name, 0.5)


@pytest.mark.usefixtures("impatient")
def test_an_actor_that_hangs_is_killed() -> None:
    actor = start()
    with cluster.ending_actors("Lingering"):
        call = actor.hang.remote()
    is_killed(call)


@pytest.mark.usefixtures("impatient")
def test_so_it_is_where_a_run_fails() -> None:
    call = start().hang.remote()
    with pytest.raises(ValueError, match="a fault"), cluster.ending_actors("Lingering"):
        raise ValueError("a fault")
    is_killed(call)


def is_killed(call: ray.ObjectRef[Any]) -> None:
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(call, timeout=60)
    wait_until(all_is_free, 10)


def test_who_interrupts_does_not_wait() -> None:
    actor = start()
    with pytest.raises(KeyboardInterrupt), cluster.ending_actors("Lingering"):
        raise KeyboardInterrupt
    assert ray.get(actor.greet.remote()) == "hello"
    ray.kill(actor)
    wait_until(all_is_free, 10)
