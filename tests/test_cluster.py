"""The cluster: which one is joined, what is said while others hold it, and what went wrong in a worker."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pydantic
import pytest
import ray
from ray import cloudpickle

from helpers.paths import ROOT
from helpers.processes import free_port, http_server, run, wait_until
from vlmray import cluster
from vlmray.cluster import Asked, connection, waiting
from vlmray.errors import OptionError, RunError


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without a Ray, on a machine on which nobody runs `ray start`."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(connection, "read_ray_address", lambda: None)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("nonsense", "expected HOST:PORT of a cluster's head node, auto or local"),
        ("ray://127.0.0.1:1", "expected HOST:PORT of a cluster's head node, auto or local"),
        ("http://127.0.0.1:1", "expected HOST:PORT"),
        ("auto", "no cluster runs on this machine"),
        ("127.0.0.1:1", "no Ray cluster answers there; correct it or unset it"),
        ("[::1]:1", "no Ray cluster answers there"),
        ("127.0.0.1:99999", "no Ray cluster answers there"),
        ("é..:1", "no Ray cluster answers there"),
    ],
)
def test_a_wrong_address_is_named_at_once(
    address: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    started = time.monotonic()
    with pytest.raises(ValueError, match="RAY_ADDRESS") as caught:
        cluster.connect()
    assert str(caught.value).startswith(f"RAY_ADDRESS {address}: {problem}")
    assert time.monotonic() - started < 5


@pytest.mark.usefixtures("alone")
def test_other_servers_are_not_taken_for_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    with http_server(SimpleHTTPRequestHandler) as url, socket.create_server(("127.0.0.1", 0)) as silent:
        for address in (url.removeprefix("http://"), f"127.0.0.1:{silent.getsockname()[1]}"):
            monkeypatch.setenv("RAY_ADDRESS", address)
            with pytest.raises(ValueError, match=f"^RAY_ADDRESS {address}: no Ray cluster answers there"):
                cluster.connect()


@pytest.mark.parametrize("given", [None, "", " ", "local"])
def test_without_an_address_ray_starts_here(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(connection, "read_ray_address", lambda: "127.0.0.1:1")  # of a cluster that was killed
    if given is not None:
        monkeypatch.setenv("RAY_ADDRESS", given)
    assert connection._address() == "local"


def test_that_ray_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")

    def fail(**options: Any) -> None:
        raise RuntimeError("no room\nfor it")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(RunError, match=r"^Ray does not start: no room for it$"):
        cluster.connect()


# A cluster that runs elsewhere


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[dict[str, str]]:
    """A cluster of `ray start` in another folder, with a token; the environment of those who may use it."""
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret"}
    port, folder = free_port(), tempfile.mkdtemp(dir="/tmp")  # short: sockets lie in it
    options = [
        f"--port={port}", f"--ray-client-server-port={free_port()}", "--num-cpus=2",
        "--include-dashboard=false",
        f"--dashboard-agent-listen-port={free_port()}",
        f"--temp-dir={folder}",
    ]  # fmt: skip
    head = subprocess.Popen(
        [Path(sys.executable).with_name("ray"), "start", "--head", "--block", *options],
        cwd="/", env={**os.environ, **secret, "PYTHONPATH": str(ROOT)}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"127.0.0.1:{port}"
    try:
        wait_until(lambda: connection._speaks_http2(address) or head.poll() is not None)
        yield {**secret, "RAY_ADDRESS": address}
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)  # what dies may still write into it


@pytest.mark.parametrize("token", [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another"}])
def test_a_cluster_that_wants_another_token_says_so(token: dict[str, str], elsewhere: dict[str, str]) -> None:
    found = _infer("--engine fake --model_id fake", {**token, "RAY_ADDRESS": elsewhere["RAY_ADDRESS"]})
    assert found.returncode == 2
    assert (
        f"error: RAY_ADDRESS {elsewhere['RAY_ADDRESS']}: the cluster wants another token; set" in found.stderr
    )
    assert "Traceback" not in found.stderr


def test_relative_names_mean_the_same_to_workers_elsewhere(
    elsewhere: dict[str, str], tiny_model: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").symlink_to(tiny_model)
    (tmp_path / "adapter").symlink_to(tiny_adapter)
    found = _infer("--model_id model --adapter ./adapter", elsewhere, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "out" / "run.json").is_file()
    assert '"model_id": "model"' in (tmp_path / "out" / "options.json").read_text()  # as it was given


def _infer(model: str, env: dict[str, str], cwd: Path | None = None) -> Any:
    options = f"{model} --dataset_name charts --sample_slices [:1] --max_new_tokens 2 --output_dir out"
    return run(*options.split(), cwd=cwd, **env)


# What others hold


@pytest.mark.usefixtures("two_cpus")
def test_what_a_job_waits_for_is_told(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(waiting, "_PATIENCE_S", 0.5)
    holder = ray.remote(num_cpus=2)(_Holder).remote()
    ray.get(holder.wait.remote())
    with caplog.at_level(logging.WARNING):
        wait_until(lambda: ray.available_resources().get("CPU", 0) == 0)
        cluster.tell_if_taken(cpus=1.5)
    assert caplog.messages == [
        "waiting until others are done: the job asks for 1.5 CPUs, and 0 of 2 are free"
    ]
    ray.kill(holder)
    threading.Timer(0.1, caplog.clear).start()
    monkeypatch.setattr(waiting, "_PATIENCE_S", 60)
    cluster.tell_if_taken(cpus=2)
    assert not caplog.messages


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_PATIENCE_S", 0.3)
    monkeypatch.setattr(waiting, "_PERIOD_S", 0.05)


def asked(**resources: float) -> Asked:
    return Asked(count=2, least=2, name="worker", resources=resources, actors="_Holder", option="num_workers")


@pytest.mark.usefixtures("two_cpus", "soon")
def test_what_will_not_come_is_waited_for_in_vain(caplog: Any) -> None:
    started = time.monotonic()
    with (
        pytest.raises(RunError) as caught,
        cluster.saying_what_is_awaited(asked(GPU=1), limit_s=1),
    ):
        threading.Event().wait(20)
    assert 1 <= time.monotonic() - started < 10
    there = "the cluster has 0 GPU free of 0 and may start 0"
    assert caplog.messages == [f"waiting for 2 workers with 1 GPU each: {there}"]
    assert str(caught.value) == (
        f"waited 1 s: {caplog.messages[0]}; start nodes that have them, or lower --num_workers"
    )


@pytest.mark.usefixtures("two_cpus", "soon")
def test_what_others_hold_is_waited_for_as_long_as_it_takes(caplog: Any) -> None:
    other = ray.remote(num_cpus=1.5)(_Other).remote()
    ray.get(other.wait.remote())
    holders = [ray.remote(num_cpus=1)(_Holder).remote() for _ in range(2)]
    with cluster.saying_what_is_awaited(asked(CPU=1), limit_s=0):
        wait_until(lambda: caplog.messages)
        told = len(caplog.messages)
        ray.kill(other)
        ray.get([holder.wait.remote() for holder in holders])
    assert 1 <= told <= 2  # free resources are counted a little later
    assert re.match("waiting for [12] workers? with 1 CPU( each)?: the cluster has ", caplog.messages[-1])
    assert caplog.messages[-1].endswith(" CPU free of 2 and may start 0")
    for holder in holders:
        ray.kill(holder)


@pytest.mark.usefixtures("two_cpus", "soon")
def test_actors_that_have_their_place_are_not_waited_for(caplog: Any) -> None:
    """Nor are those whose model is loading, however long that takes."""
    loading = [ray.remote(num_cpus=1)(_Holder).remote(load_s=3) for _ in range(2)]
    waits = waiting.Waiting(asked(CPU=1), limit_s=0)
    wait_until(lambda: waits._count_actors() == (2, 0))
    caplog.clear()
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        waits.look()
    assert not caplog.messages
    for holder in loading:
        ray.kill(holder)


@pytest.mark.usefixtures("two_cpus", "soon")
def test_members_of_a_pool_that_have_done_their_work_are_not_waited_for(caplog: Any) -> None:
    pool = dataclasses.replace(asked(CPU=1.5), is_pool=True)
    holders = [ray.remote(num_cpus=1.5)(_Holder).remote() for _ in range(2)]
    waits = waiting.Waiting(pool, limit_s=1000)
    one = "waiting for 1 worker with 1.5 CPU: "
    wait_until(lambda: waits.look() or (caplog.messages and caplog.messages[-1].startswith(one)))
    for holder in holders:
        ray.kill(holder)
    wait_until(lambda: waits._count_actors() == (0, 0))
    caplog.clear()
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        waits.look()
    assert not caplog.messages


class _Other:
    def wait(self) -> None:
        pass


class _Holder:
    def __init__(self, load_s: float = 0) -> None:
        time.sleep(load_s)

    def wait(self) -> None:
        pass


# What went wrong in a worker


cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it


def _fail(kind: str) -> None:
    if kind == "lines":
        raise ValueError("the cause\n in two lines")
    if kind == "mistake":
        raise OptionError("model_id", "x is wrong", "pass y")
    if kind == "disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full")
    if kind == "ours":
        try:
            _fail("disk")
        except OSError as error:
            raise RunError("no space left on device: /full") from error
    pydantic.TypeAdapter(int).validate_python("x")


class _Failing:
    def __init__(self, kind: str) -> None:
        _fail(kind)

    def __call__(self, rows: Any) -> Any:
        return rows


def _fail_in_a_task(kind: str) -> None:
    ray.get(ray.remote(_fail).remote(kind))


def _fail_in_an_actor(kind: str) -> None:
    ray.get(ray.remote(_Failing).remote(kind).__call__.remote(0))  # type: ignore[attr-defined]


def _fail_in_ray_data(kind: str) -> None:
    ray.data.range(1).map_batches(lambda _: _fail(kind)).materialize()


def _fail_in_a_pool(kind: str) -> None:
    ray.data.range(1).map_batches(_Failing, fn_constructor_args=(kind,), concurrency=1).materialize()


_CAUSES = {
    "lines": "ValueError: the cause in two lines",
    "mistake": "--model_id x is wrong; pass y",
    "disk": "no space left on device: free some and run again (",
    "ours": "no space left on device: /full",
    "validation": "ValidationError: 1 validation error for int Input should be a valid integer",
}


@pytest.mark.usefixtures("two_cpus")
@pytest.mark.parametrize(
    ("place", "kinds"),
    [
        (_fail_in_a_task, _CAUSES),
        (_fail_in_an_actor, _CAUSES),
        (_fail_in_ray_data, ("lines", "ours")),
        (_fail_in_a_pool, ("mistake", "ours")),
    ],
)
def test_the_cause_is_kept_and_advice_is_not(place: Any, kinds: Iterable[str]) -> None:
    for kind in kinds:
        with pytest.raises(ray.exceptions.RayError) as caught:
            place(kind)
        found = cluster.root_cause(caught.value)
        assert found.removeprefix("pydantic_core._pydantic_core.").startswith(_CAUSES[kind])
        for advice in ("To change retry", "Failed to", "For further information", "ray::", "\n"):
            assert advice not in found


@pytest.mark.usefixtures("two_cpus")
def test_nodes_with_gpus_are_asked_for_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cluster.find_gpu_objection("json", "INFO") == "the cluster has no GPU"
    (node,) = (node for node in ray.nodes() if node["Alive"])
    nominal = {**node, "Resources": {**node["Resources"], "GPU": 1.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [nominal])
    assert cluster.find_gpu_objection("json", "INFO") is None
    address = node["NodeManagerAddress"]
    assert cluster.find_gpu_objection("no_such_package", "INFO") == f"{address} with GPUs lacks it"
