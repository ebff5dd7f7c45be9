"""Servers that come and go: replicas by load, full queues, clients that leave, signals, mistakes."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import openai
import pytest
import requests
from ray import serve

from helpers.paths import ROOT
from helpers.processes import free_port, wait_until
from helpers.servers import figures, in_progress, make_client, num_running
from vlmray.builtin.models import BUILTIN
from vlmray.cluster import plans
from vlmray.cluster.resources import Node
from vlmray.config import ServeConfig
from vlmray.engines.fake import FakeEngine
from vlmray.schema import GenerationRequest
from vlmray.serving import address, handles
from vlmray.serving import server as serving
from vlmray.serving.backend import Reply
from vlmray.serving.errors import BusyError
from vlmray.serving.replica import ModelReplica
from vlmray.serving.server import API_KEY, APP_NAME, app, build_application, serve_app

pytestmark = pytest.mark.usefixtures("two_cpus")


def test_load_starts_replicas_and_quiet_stops_them() -> None:
    config = ServeConfig(
        model_id="fake?latency_s=0.2", engine="fake", num_replicas="1,3", max_batch_size=2, port=free_port(),
        target_ongoing_requests=2, upscale_delay_s=1, downscale_delay_s=2, max_queued_requests=100,
    )  # fmt: skip
    with serve_app(config) as server:
        client = make_client(server)
        assert num_running() == 1
        stop = threading.Event()

        def load() -> None:
            while not stop.is_set():
                client.chat.completions.create(
                    model=config.model_id, messages=[{"role": "user", "content": "hi"}]
                )

        with ThreadPoolExecutor(12) as pool:
            loads = [pool.submit(load) for _ in range(12)]
            try:
                wait_until(lambda: num_running() == 3)
            finally:
                stop.set()
            for each in loads:
                each.result()
        wait_until(lambda: num_running() == 1)


def test_a_full_queue_is_refused_not_kept() -> None:
    config = ServeConfig(
        model_id="fake?latency_s=0.5",
        engine="fake",
        max_batch_size=1,
        max_queued_requests=1,
        port=free_port(),
    )
    with serve_app(config) as server:

        def answer(number: int) -> tuple[int, str | None]:
            body = {"model": config.model_id, "messages": [{"role": "user", "content": str(number)}]}
            response = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
            return response.status_code, response.headers.get("retry-after")

        with ThreadPoolExecutor(12) as pool:
            statuses = list(pool.map(answer, range(12)))
        refused = [int(after) for status, after in statuses if status == 503 and after]
        assert 200 in dict(statuses)
        assert len(refused) + sum(status == 200 for status, _ in statuses) == 12
        assert refused
        assert max(refused) <= 60
        assert answer(0) == (200, None)
        impatient = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2)

        def keep_asking(number: int) -> str | None:
            message: Any = {"role": "user", "content": str(number)}
            answered = impatient.chat.completions.create(model=config.model_id, messages=[message])
            return answered.choices[0].message.content

        with ThreadPoolExecutor(12) as pool:  # of whom all but two or three are turned away at first
            assert all(pool.map(keep_asking, range(12)))


def test_the_model_is_free_within_a_token_of_the_client(tmp_path: Path) -> None:
    """A client that closes its stream, one that waits no longer, and a request past its time limit."""
    log = tmp_path / "tokens"
    log.touch()
    config = ServeConfig(
        model_id=f"fake?answer={'+'.join('x' * 1000)}&token_s=0.2&token_log={log}", served_model_name="fake",
        engine="fake", max_batch_size=1, max_queued_requests=4, stream_interval_s=0, port=free_port(),
    )  # fmt: skip

    def num_tokens() -> int:
        return len(log.read_text().split())

    with serve_app(config) as server:
        client = make_client(server)
        endless: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}

        def close_the_stream() -> None:
            stream = client.chat.completions.create(**endless, stream=True)
            assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "x"]
            stream.close()

        def wait_no_longer() -> None:
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.5).chat.completions.create(**endless)

        def be_over_the_limit() -> None:
            limit = {"x-request-timeout-seconds": "0.5"}  # Serve's own header
            with pytest.raises(openai.APIStatusError, match="408"):
                client.chat.completions.create(**endless, extra_headers=limit)

        with client.chat.completions.create(**endless, stream=True) as stream:
            next(stream)
            for _ in range(3):  # those before it would fill the line, if they were still in it
                with ThreadPoolExecutor(3) as pool:
                    list(pool.map(lambda _: wait_no_longer(), range(3)))
                wait_until(lambda: in_progress(server) == 1)
        for leave in (close_the_stream, wait_no_longer, be_over_the_limit):
            leave()
            before = num_tokens()
            answer = client.chat.completions.create(**endless, max_tokens=1)  # the model is for one at a time
            assert answer.choices[0].message.content == "x"
            assert num_tokens() <= before + 6 + 1, (
                leave
            )  # of 1000; some time passes on the way to the replica
            wait_until(lambda: in_progress(server) == 0)
        name = 'vlmray_requests_total{model="fake",status="499"}'
        wait_until(lambda: figures(server)[name] >= 3 * 3 + 1 + 3)
        assert figures(server)[name] == 3 * 3 + 1 + 3


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_server_answers_what_is_in_progress(stop: signal.Signals) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, str(ROOT / "jobs" / "serve.py"), "--engine", "fake", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--model_id", "fake?latency_s=3&answer=done"], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "RAY_ADDRESS": ""},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert f"is served at {url}/v1" in process.stdout.readline()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        message: Any = {"role": "user", "content": "hi"}
        model = client.models.list().data[0].id
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.chat.completions.create, model=model, messages=[message])
            wait_until(lambda: re.search(r"in_flight\S* 1\.0", requests.get(f"{url}/metrics").text))
            process.send_signal(stop)
            wait_until(lambda: requests.get(f"{url}/ready").status_code == 503)
            assert requests.get(f"{url}/health").status_code == 200
            with pytest.raises(openai.InternalServerError, match="the server is stopping"):
                client.chat.completions.create(model=model, messages=[message])
            assert answer.result().choices[0].message.content == "done"
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert errors == ""
    finally:
        process.kill()


def test_the_server_is_alive_before_it_is_ready() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    serve.start(http_options={"port": port})
    application = app({"model_id": "fake?load_s=6", "engine": "fake"})

    def status(path: str) -> int | None:
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(f"{url}{path}", timeout=30).status_code
        return None

    try:
        threading.Thread(target=serve.run, args=(application,), kwargs={"name": APP_NAME}).start()
        wait_until(lambda: status("/health") == 200)
        assert status("/ready") == 503
        wait_until(lambda: status("/ready") == 200)
        message = {"role": "user", "content": "hi"}
        body = {"model": "fake?load_s=6", "messages": [message]}
        assert requests.post(f"{url}/v1/chat/completions", json=body, timeout=30).status_code == 200
    finally:
        serve.shutdown()


def test_serve_itself_can_run_it() -> None:
    """What `serve run vlmray.serving:app model_id=fake engine=fake` does."""
    port = free_port()
    serve.start(http_options={"port": port})
    options = {"model_id": "fake?max_model_len=9", "engine": "fake", "max_batch_size": "4"}
    serve.run(app(options), name="another")
    try:
        assert requests.get(f"http://127.0.0.1:{port}/health").json() == {"status": "ok"}
        assert requests.get(f"http://127.0.0.1:{port}/ready").json() == {"status": "ready"}
        (model,) = requests.get(f"http://127.0.0.1:{port}/v1/models").json()["data"]
        assert model["max_model_len"] == 9
    finally:
        serve.shutdown()


def test_a_server_takes_no_place_that_is_taken_unless_told_to() -> None:
    def start(**options: Any) -> Any:
        return serve_app(ServeConfig(model_id="fake", engine="fake", port=free_port(), **options))

    def served(server: Any) -> str:
        return str(requests.get(f"{server.url}/v1/models").json()["data"][0]["id"])

    first = start(served_model_name="first")
    problem = rf"^this cluster serves first already, at {first.url}; .* \(vlmray serve --replace\)"
    with pytest.raises(ValueError, match=problem):
        start()
    assert served(first) == "first"
    with start(served_model_name="second", replace=True) as second:
        assert first.stop() == 0
        assert served(second) == "second"


@pytest.mark.parametrize("num_read", [1, 2])
def test_a_call_that_nobody_reads_to_its_end_is_cancelled(num_read: int) -> None:
    completion = FakeEngine().generate([GenerationRequest(request_id="x", messages=[])])[0]
    cancelled: list[bool] = []

    class Handle:
        """A handle and what a call of it returns."""

        answer = property(lambda self: SimpleNamespace(remote=lambda *args: self))

        def options(self, **options: Any) -> Handle:
            return self

        def cancel(self) -> None:
            cancelled.append(True)

        async def __aiter__(self) -> AsyncIterator[str | Reply]:
            yield "piece"
            yield Reply(completion, 1)

    async def check() -> None:
        request = GenerationRequest(request_id="x", messages=[])
        pieces = handles.Replicas(cast(Any, Handle()), 1, 60.0).answer(request, stream=True)
        for _ in range(num_read):
            await anext(pieces)
        await pieces.aclose()

    asyncio.run(check())
    assert cancelled == ([True] if num_read == 1 else [])


@pytest.mark.parametrize("num_running", [0, 1])
def test_where_no_replica_runs_a_request_waits_a_while_and_else_as_long_as_it_takes(
    num_running: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    completion = FakeEngine().generate([GenerationRequest(request_id="x", messages=[])])[0]
    times_asked = 0
    cancelled: list[bool] = []

    class Handle:
        answer = property(lambda self: SimpleNamespace(remote=lambda *args: self))

        def options(self, **options: Any) -> Handle:
            return self

        def cancel(self) -> None:
            cancelled.append(True)

        async def __aiter__(self) -> AsyncIterator[str | Reply]:
            while times_asked < 3:
                await asyncio.sleep(0.01)
            yield Reply(completion, 1)

    async def running(replicas: Any) -> int:
        nonlocal times_asked
        times_asked += 1
        return num_running

    async def check() -> None:
        request = GenerationRequest(request_id="x", messages=[])
        pieces = handles.Replicas(cast(Any, Handle()), 0, startup_timeout_s=0.05).answer(
            request, stream=False
        )
        assert [piece async for piece in pieces] == [Reply(completion, 1)]

    monkeypatch.setattr(handles.Replicas, "_num_running", running)
    if num_running:
        asyncio.run(check())
    else:
        with pytest.raises(BusyError, match=r"no replica has started within 0\.05 s"):
            asyncio.run(check())
    assert (times_asked, cancelled) == ((3, []) if num_running else (1, [True]))


def test_replicas_that_share_a_card_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[Any] = []
    deployment = SimpleNamespace(bind=lambda *args: bound.extend(args))
    monkeypatch.setattr(serving, "_MODEL", SimpleNamespace(options=lambda **options: deployment))
    for name in ("reachable", "present"):
        monkeypatch.setattr(plans, name, lambda resource: 1.0)
    monkeypatch.setattr(plans, "present_nodes", lambda: [Node(name="one", resources={"GPU": 1})])
    build_application(ServeConfig(model_id="fake", engine="fake", gpus_per_replica=0.5))
    arguments = inspect.signature(ModelReplica).bind(*bound).arguments
    assert (arguments["num_threads"], arguments["memory_fraction"]) == (None, 0.5)


def test_mistakes_are_named_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_adapter: Path
) -> None:
    monkeypatch.delenv(API_KEY, raising=False)
    with pytest.raises(ValueError, match=f"--host 0.0.0.0 lets others in; set {API_KEY}"):
        serve_app(ServeConfig(model_id="fake", engine="fake", host="0.0.0.0"))
    monkeypatch.setattr(address, "_PATIENCE_S", 0.1)
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ValueError, match="Address already in use; pass another port"),
    ):
        serve_app(ServeConfig(model_id="fake", engine="fake", port=taken.getsockname()[1]))
    with pytest.raises(ValueError, match=r"was made for .* and does not fit"):
        serve_app(ServeConfig(model_id=BUILTIN, adapters=f"alien={tiny_adapter}", port=free_port()))
    with pytest.raises(FileNotFoundError, match=r"--adapter_dir .*gone"):
        serve_app(ServeConfig(model_id=BUILTIN, adapter_dir=str(tmp_path / "gone"), port=free_port()))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        serve_app(ServeConfig(model_id="./gone", port=free_port()))
    with pytest.raises(ValueError, match="expected name=folder"):
        ServeConfig(adapters="first")
    with pytest.raises(ValueError, match=r"--num_replicas must be N or MIN,MAX of at least 0,1"):
        ServeConfig(num_replicas="0")
