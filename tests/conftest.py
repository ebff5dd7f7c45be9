"""Fixtures that more than one test file uses."""

from __future__ import annotations

import functools
import gc
import inspect
import os
import signal
import types
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from helpers import clusters, processes
from vlmray.builtin.random_models import build_tiny_random_model
from vlmray.engines.fake import build_tiny_random_adapter

# Tiny models gain nothing from threads, and threads that wait for a busy core make them ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that runs the tests in the background makes them, and all they start, deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what takes long by what it uses, so that `make test-fast` can leave it out, and spread it."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "two_cpus" in fixtures:
            item.add_marker("ray")
        if "spare_time" in fixtures:
            item.add_marker("training")
        module = getattr(item, "module", None)  # doctests have none
        if getattr(module, "cluster_of", None) is clusters.cluster_of:
            item.add_marker("nodes")
        starters = (getattr(module, name, None) is getattr(processes, name) for name in ("run", "start"))
        if any(starters) or starts_processes(getattr(item, "function", None)):
            item.add_marker("processes")
    items[:] = spread(items)


WAITING = ("nodes", "processes", "ray")
"""Marks of what waits for processes to start more than it computes, the longest first."""


def spread(items: list[pytest.Item]) -> list[pytest.Item]:
    """Put files whose tests wait evenly between those that compute: then both run at a time."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    kinds: dict[bool, list[tuple[int, list[pytest.Item]]]] = {True: [], False: []}
    for tests in files.values():
        marks = {mark.name for test in tests for mark in test.iter_markers()}
        kind = next((place for place, mark in enumerate(WAITING) if mark in marks), len(WAITING))
        kinds[kind < len(WAITING)].append((kind, tests))
    placed = [
        (place / len(found), tests)
        for found in kinds.values()
        for place, (_, tests) in enumerate(sorted(found, key=lambda each: each[0]))
    ]
    return [test for _, tests in sorted(placed, key=lambda each: each[0]) for test in tests]


def pytest_collection_finish() -> None:
    """Spare garbage collections, of which every engine that closes makes one, all that was imported."""
    gc.collect()
    gc.freeze()


def starts_processes(function: object, depth: int = 3) -> bool:
    """Tell whether a test, or a function that it calls, names `subprocess`."""
    if not inspect.isfunction(function) or not depth:
        return False
    names = names_in(function.__code__)
    called = (function.__globals__.get(name) for name in names)
    return "subprocess" in names or any(starts_processes(each, depth - 1) for each in called)


def names_in(code: types.CodeType) -> set[str]:
    """Names that a function uses, comprehensions and functions in it included."""
    inner = (names_in(each) for each in code.co_consts if isinstance(each, types.CodeType))
    return set(code.co_names).union(*inner)


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    """Jobs end their process, so they leave its signals as they like; the next SIGINT would end the tests."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2.5-VL checkpoint folder, built once."""
    return build_tiny_random_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA adapter for `tiny_model`, built once."""
    return build_tiny_random_adapter(tmp_path_factory.mktemp("adapters") / "first", tiny_model, seed=1)


@pytest.fixture
def hub_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of `org/name` in a hub cache of the test's own; it is empty, so no model yet."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    return snapshot


@pytest.fixture(scope="module")
def spare_time() -> Iterator[None]:
    """Leave out what takes longer than a training of a few steps: all trainings share a processor, and the
    garbage that trainers and engines collect as they come and go is collected in its own time."""
    from vlmray.models import loading

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(loading, "load_processor", functools.cache(loading.load_processor))
        monkeypatch.setattr(gc, "collect", lambda *_: 0)
        yield


@pytest.fixture(scope="session")
def two_cpus() -> Iterator[None]:
    """A Ray of this process with two CPUs, whatever the machine has."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
