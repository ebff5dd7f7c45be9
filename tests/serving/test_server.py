"""The server on a real Ray cluster: right answers under load, after a killed replica, and to the end."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import inspect
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import openai
import psutil
import pyarrow.parquet as pq
import pytest
import requests
from ray import serve

from helpers.paths import ROOT
from helpers.processes import descendants, free_port, http_server, huge_png, wait_until
from vlmray import cluster
from vlmray.builtin.charts import ChartsSource
from vlmray.builtin.models import BUILTIN, BUILTIN_FOLDER
from vlmray.config import InferConfig, ServeConfig
from vlmray.engines import build_engine
from vlmray.engines.fake import FakeEngine, build_tiny_random_adapter
from vlmray.inference.job import run_inference
from vlmray.inference.plan import plan_inference
from vlmray.schema import GenerationRequest
from vlmray.serving import server as serving
from vlmray.serving.backend import Reply
from vlmray.serving.replica import ModelReplica
from vlmray.serving.server import API_KEY, APP_NAME, Server, app, build_application, serve_app

CHARTS = "charts?num_rows=48&kind=bar&style=plain&seed=91&questions_per_image=4"
NUM_REQUESTS = 500
pytestmark = pytest.mark.usefixtures("two_cpus")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: build_tiny_random_adapter(folder / name, BUILTIN_FOLDER, seed=seed)
        for seed, name in enumerate(("first", "second"))
    }


@pytest.fixture(scope="module")
def inferred(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the inference job answers to the charts; it runs before the server takes the CPUs."""
    folder = tmp_path_factory.mktemp("inferred")
    config = InferConfig(
        model_id=BUILTIN, dataset_name=CHARTS, sample_slices="[:]", output_dir=str(folder), max_new_tokens=32,
        dtype="float32", output_format="parquet",
    )  # fmt: skip
    run_inference(plan_inference(config))
    rows = pq.read_table(folder / "predictions").sort_by("row_index").to_pylist()
    return [row["prediction"] for row in rows]


@pytest.fixture(scope="module")
def server(adapters: dict[str, Path], inferred: list[str]) -> Iterator[Server]:
    """The built-in model and two adapters on two replicas."""
    config = ServeConfig(
        model_id=BUILTIN, adapters=",".join(f"{name}={path}" for name, path in adapters.items()),
        port=free_port(), num_replicas="2", dtype="float32", allow_private_image_urls=True, max_new_tokens=32,
    )  # fmt: skip
    with serve_app(config) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return make_client(server)


def make_client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def chart_rows() -> list[dict[str, Any]]:
    source = ChartsSource(CHARTS, "test")
    return source.read(list(range(len(source))), ["image", "question"])


def question(row: dict[str, Any], url: str = "") -> Any:
    """The messages that ask about a row's image, or about one behind a URL."""
    url = url or f"data:image/png;base64,{base64.b64encode(row['image']).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": row["question"]}]
    return [{"role": "user", "content": parts}]


def ask(client: openai.OpenAI, row: dict[str, Any], model: str = BUILTIN, url: str = "") -> str:
    completion = client.chat.completions.create(model=model, messages=question(row, url))
    return completion.choices[0].message.content or ""


def num_running() -> int:
    return serve.status().applications[APP_NAME].deployments["model"].replica_states.get("RUNNING", 0)


def replica_processes() -> list[psutil.Process]:
    return descendants(f"ServeReplica:{APP_NAME}:model")


def test_models_are_the_base_and_its_adapters(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [BUILTIN, "first", "second"]


def test_answers_are_those_of_infer(client: openai.OpenAI, inferred: list[str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: ask(client, row), chart_rows()))
    assert found == inferred
    assert len(set(found)) > 10


def test_images_by_url_and_streams_give_the_same_text(client: openai.OpenAI, tmp_path: Path) -> None:
    row = chart_rows()[3]
    (tmp_path / "chart.png").write_bytes(row["image"])

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, format: str, *args: object) -> None:
            pass

    expected = ask(client, row)
    with http_server(Handler) as files:
        url = f"{files}/chart.png"
        assert ask(client, row, url=url) == expected
        chunks = client.chat.completions.create(model=BUILTIN, messages=question(row, url), stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_the_example_of_the_readme_runs(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chart.png").write_bytes(chart_rows()[0]["image"])
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n([^`]*?OpenAI.*?)```", readme, flags=re.DOTALL)
    exec(compile(code.replace("http://127.0.0.1:8000", server.url), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip().isdigit()


def test_500_requests_are_each_answered_right_though_a_replica_is_killed(
    server: Server, client: openai.OpenAI, adapters: dict[str, Path]
) -> None:
    rows = chart_rows()
    models = [BUILTIN, "first", "second"]
    tasks = [(rows[number % len(rows)], models[number % 3]) for number in range(NUM_REQUESTS)]
    engine: Any = build_engine(engine="transformers", model_id=BUILTIN, dtype="float32")
    for name, path in adapters.items():
        engine.load_adapter(name, str(path))
    names = {model: None if model == BUILTIN else model for model in models}
    expected = {model: [answer_alone(engine, row, names[model]) for row in rows] for model in models}
    num_done = 0

    def answer(task: tuple[dict[str, Any], str]) -> str:
        nonlocal num_done
        text = ask(client, *task)
        num_done += 1
        return text

    (victim, _) = replica_processes()
    with ThreadPoolExecutor(32) as pool:
        answers = pool.map(answer, tasks)
        wait_until(lambda: num_done >= NUM_REQUESTS // 5)
        victim.kill()
        found = list(answers)
    assert len(found) == NUM_REQUESTS
    for number, ((_, model), text) in enumerate(zip(tasks, found, strict=True)):
        assert text == expected[model][number % len(rows)], number
    assert len({tuple(expected[model]) for model in models}) == 3
    wait_until(lambda: num_running() == 2)
    assert victim.pid not in [process.pid for process in replica_processes()]


def figures(server: Server) -> dict[str, float]:
    """The server's metrics by name and labels."""
    lines = requests.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    values = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in values}


def in_progress(server: Server) -> float:
    names = ("vlmray_requests_in_flight", "vlmray_requests_queued")
    return sum(value for name, value in figures(server).items() if name.startswith(names))


def test_answers_stay_right_while_many_come_and_leave(
    server: Server, client: openai.OpenAI, inferred: list[str]
) -> None:
    """Leaving in line, in the middle of an answer, or while an adapter's neighbours are answered."""
    rows, chance = chart_rows(), random.Random(0)
    models = [BUILTIN, "first", "second"]

    def visit(number: int) -> str | None:
        row, kind = rows[number % len(rows)], number % 3
        if kind == 0:
            return ask(client, row)
        model = models[number % 2]
        if kind == 1:
            client.chat.completions.create(model=model, messages=question(row), stream=True).close()
        else:
            with contextlib.suppress(openai.APITimeoutError):
                ask(client.with_options(timeout=chance.uniform(0.05, 1)), row, model)
        return None

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(visit, range(360)))
    for number in range(0, 360, 3):
        assert found[number] == inferred[number % len(rows)], number
    wait_until(lambda: in_progress(server) == 0)
    left = 'vlmray_requests_total{model="%s",status="499"}'
    assert sum(figures(server).get(left % model, 0) for model in models) > 60
    assert ask(client, rows[0]) == inferred[0]


def test_floods_and_bombs_leave_the_server_as_it_was(server: Server, client: openai.OpenAI) -> None:
    """Through Serve's own proxy: 100 MB with and without a declared length, and huge or broken images."""

    def private_bytes() -> int:
        actors = [*descendants("ray::ProxyActor"), *descendants("ray::ServeReplica")]
        usage = [process.memory_info() for process in actors]
        return sum(each.rss - each.shared for each in usage)

    def post(body: Any) -> tuple[int, float]:
        started = time.monotonic()
        headers = {"Content-Type": "application/json"}
        with contextlib.suppress(requests.ConnectionError):  # refused before all of it was sent
            url = f"{server.url}/v1/chat/completions"
            return requests.post(url, data=body, headers=headers, timeout=60).status_code, (
                time.monotonic() - started
            )
        return 413, time.monotonic() - started

    def image(data: bytes) -> bytes:
        url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
        return json.dumps({"model": BUILTIN, "messages": [message]}).encode()

    row = chart_rows()[0]
    megabyte = b" " * 2**20
    attacks: list[tuple[Callable[[], Any], int]] = [
        (lambda: megabyte * 100, 413),
        (lambda: (megabyte for _ in range(100)), 413),
        (lambda: image(huge_png(50_000, 50_000)), 400),
        (lambda: image(row["image"][:500]), 400),
        (lambda: image(b"\x00" * 20_000_000), 400),
        (lambda: b"{" * 1_000_000, 400),
    ]
    expected = ask(client, row)
    for make, _ in attacks * 2:  # the first times, code and pools of memory come in
        post(make())
    before = private_bytes()
    for make, status in attacks * 3:
        found, elapsed_s = post(make())
        assert found == status
        assert elapsed_s < 10
        assert ask(client, row) == expected
    assert private_bytes() - before < 256 * 2**20


def test_adapters_come_at_run_time_and_make_room_for_each_other(
    server: Server, adapters: dict[str, Path], tmp_path: Path, tiny_adapter: Path, inferred: list[str]
) -> None:
    """One server at a time fits on two CPUs, so this one follows on that of the module."""
    server.stop()
    rows = chart_rows()[:4]
    config = ServeConfig(
        model_id=BUILTIN, served_model_name="reader", adapter_dir=str(tmp_path), max_adapters=1,
        port=free_port(), dtype="float32", max_new_tokens=32,
    )  # fmt: skip
    with serve_app(config) as changed:
        client = make_client(changed)
        assert [model.id for model in client.models.list()] == ["reader"]
        assert [ask(client, row, "reader") for row in rows] == inferred[:4]
        for name, path in {**adapters, "alien": tiny_adapter}.items():
            shutil.copytree(path, tmp_path / name)
        assert [model.id for model in client.models.list()] == ["reader", "alien", "first", "second"]
        tasks = [(row, name) for _ in range(4) for row in rows for name in ("first", "second", "reader")]
        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(lambda task: ask(client, *task), tasks))
        engine: Any = build_engine(engine="transformers", model_id=BUILTIN, dtype="float32")
        for name, path in adapters.items():
            engine.load_adapter(name, str(path))
        assert found == [answer_alone(engine, row, None if name == "reader" else name) for row, name in tasks]
        with pytest.raises(openai.BadRequestError, match=r"was made for .* and does not fit"):
            ask(client, rows[0], "alien")
        with pytest.raises(openai.BadRequestError, match=r"127\.0\.0\.1 is not a public address"):
            ask(client, rows[0], "reader", url="http://127.0.0.1:9/a.png")


def answer_alone(engine: Any, row: dict[str, Any], adapter: str | None) -> str:
    parts = [{"type": "image"}, {"type": "text", "text": row["question"]}]
    request = GenerationRequest(
        request_id="x", images=[row["image"]], max_new_tokens=32, adapter=adapter,
        messages=[{"role": "user", "content": parts}],
    )  # fmt: skip
    return str(engine.generate([request])[0].text)


@pytest.mark.usefixtures("server")  # which has stopped by now: one server at a time
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


@pytest.mark.usefixtures("server")
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
        assert set(statuses) == {(200, None), (503, "1")}
        assert answer(0) == (200, None)


@pytest.mark.usefixtures("server")
def test_the_model_is_free_within_a_token_of_the_client(tmp_path: Path) -> None:
    """A client that closes its stream, one that waits no longer, and a request past its time limit."""
    log = tmp_path / "tokens"
    log.touch()
    config = ServeConfig(
        model_id=f"fake?answer={'+'.join('x' * 1000)}&token_s=0.05&token_log={log}", served_model_name="fake",
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
        assert figures(server)['vlmray_requests_total{model="fake",status="499"}'] == 3 * 3 + 1 + 3


@pytest.mark.usefixtures("server")
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
            wait_until(lambda: "in_flight 1.0" in requests.get(f"{url}/metrics").text)
            process.send_signal(stop)
            wait_until(lambda: requests.get(f"{url}/health").status_code == 503)
            with pytest.raises(openai.InternalServerError, match="the server is stopping"):
                client.chat.completions.create(model=model, messages=[message])
            assert answer.result().choices[0].message.content == "done"
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert errors == ""
    finally:
        process.kill()


@pytest.mark.usefixtures("server")
def test_serve_itself_can_run_it() -> None:
    """What `serve run vlmray.serving:app model_id=fake engine=fake` does."""
    port = free_port()
    serve.start(http_options={"port": port})
    serve.run(app({"model_id": "fake", "engine": "fake", "max_batch_size": "4"}), name=APP_NAME)
    try:
        assert requests.get(f"http://127.0.0.1:{port}/health").json() == {"status": "ok"}
    finally:
        serve.shutdown()


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
        pieces = serving._Replicas(cast(Any, Handle())).answer(request, stream=True)
        for _ in range(num_read):
            await anext(pieces)
        await pieces.aclose()

    asyncio.run(check())
    assert cancelled == ([True] if num_read == 1 else [])


def test_replicas_that_share_a_card_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[Any] = []
    deployment = SimpleNamespace(bind=lambda *args: bound.extend(args))
    monkeypatch.setattr(serving, "_MODEL", SimpleNamespace(options=lambda **options: deployment))
    for name in ("_most", "_present"):
        monkeypatch.setattr(cluster, name, lambda resource: 1.0)
    build_application(ServeConfig(model_id="fake", engine="fake", gpus_per_replica=0.5))
    arguments = inspect.signature(ModelReplica).bind(*bound).arguments
    assert (arguments["num_threads"], arguments["memory_fraction"]) == (None, 0.5)


def test_mistakes_are_named_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_adapter: Path
) -> None:
    monkeypatch.delenv(API_KEY, raising=False)
    with pytest.raises(ValueError, match=f"--host 0.0.0.0 lets others in; set {API_KEY}"):
        serve_app(ServeConfig(model_id="fake", engine="fake", host="0.0.0.0"))
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
