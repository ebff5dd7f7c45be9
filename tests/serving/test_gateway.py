"""The gateway over real HTTP: what it takes, what it refuses and how. Answers come from a fake engine."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler
from typing import Any

import openai
import psutil
import pytest
import uvicorn
from PIL import Image
from prometheus_client import generate_latest

from helpers.processes import http_server, huge_png
from vlmray.config import ServeConfig
from vlmray.engines.fake import FakeEngine
from vlmray.schema import GenerationRequest
from vlmray.serving.backend import Reply
from vlmray.serving.errors import BusyError
from vlmray.serving.gateway import Gateway
from vlmray.serving.http import build_app

KEY = "open sesame"
MODEL = "fake"


def png(size: tuple[int, int] = (40, 30), colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


class Backend:
    """Answers with a fake engine, word by word; holds every answer while `open` is not set, and those of
    streams behind their first word while `flowing` is not."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.requests: list[GenerationRequest] = []
        self.open, self.flowing = threading.Event(), threading.Event()
        self.open.set()
        self.flowing.set()
        self.num_given_up = 0
        self.busy = False
        self.break_after: int | None = None

    async def answer(self, request: GenerationRequest, *, stream: bool) -> AsyncGenerator[str | Reply]:
        if self.busy:
            raise BusyError("too many requests are waiting")
        self.requests.append(request)
        try:
            await until(self.open)
            (completion,) = self.engine.generate([request])
            words = completion.text.split(" ")
            for place, word in enumerate(words if stream else []):
                if self.break_after == place:
                    raise RuntimeError("secret detail")
                yield word if place == len(words) - 1 else f"{word} "
                await until(self.flowing)
        except (asyncio.CancelledError, GeneratorExit):
            self.num_given_up += 1
            raise
        yield Reply(completion, 1)


async def until(event: threading.Event) -> None:
    while not event.is_set():
        await asyncio.sleep(0.01)


@contextlib.contextmanager
def serving(backend: Backend, key: str | None = KEY, **options: Any) -> Iterator[tuple[str, Gateway]]:
    """A gateway on a free port of this machine."""
    config = ServeConfig(model_id=MODEL, adapters="chart=/nowhere", **options)
    gateway = Gateway(config, backend, hashlib.sha256(key.encode()).digest() if key else None)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(build_app(gateway), log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", gateway
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="module")
def backend() -> Backend:
    return Backend()


@pytest.fixture(scope="module")
def url(backend: Backend) -> Iterator[str]:
    with serving(backend, max_body_bytes=2**20, max_images=3, image_timeout_s=1.0) as (url, _):
        yield url


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def ask(question: str = "How many?", *images: str, **fields: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    content = [*parts, {"type": "text", "text": question}]
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


def post(
    url: str,
    body: bytes | dict[str, Any],
    headers: dict[str, str] | None = None,
    path: str = "/v1/chat/completions",
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return status, body and headers of one request."""
    connection = HTTPConnection(url.removeprefix("http://"), timeout=20)
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    default = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before all was sent
            connection.request("POST", path, data, {**default, **(headers or {})})
        response = connection.getresponse()
        return response.status, json.loads(response.read()), dict(response.headers)
    finally:
        connection.close()


# --- what is answered ----------------------------------------------------------------------------


def test_the_client_is_answered(client: openai.OpenAI, backend: Backend) -> None:
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": data_uri(png())}},
            {"type": "text", "text": "How many?"},
        ]},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "And now?"},
    ]  # fmt: skip
    completion = client.chat.completions.create(
        model="chart", messages=messages, max_tokens=5, temperature=0.5, top_p=0.9, seed=-7, stop="x"
    )
    request = backend.requests[-1]
    assert completion.choices[0].message.content == FakeEngine().generate([request])[0].text
    assert completion.choices[0].finish_reason == "stop"
    assert completion.model == "chart"
    assert completion.usage is not None
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + 2
    assert request == GenerationRequest(
        request_id="chat", adapter="chart", images=[png()], stop=("x",), max_new_tokens=5, temperature=0.5,
        top_p=0.9, seed=-7,
        messages=[
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "3"}]},
            {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
        ],
    )  # fmt: skip


def test_defaults_are_greedy_and_bounded(client: openai.OpenAI, backend: Backend) -> None:
    client.chat.completions.create(**ask())
    request = backend.requests[-1]
    assert (request.temperature, request.top_p, request.max_new_tokens) == (0, 1, 512)
    assert request.adapter is None
    client.chat.completions.create(**ask(max_completion_tokens=1))
    assert backend.requests[-1].max_new_tokens == 1


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**ask("Which?")).choices[0].message.content
    chunks = list(
        client.chat.completions.create(**ask("Which?"), stream=True, stream_options={"include_usage": True})
    )
    deltas = [chunk.choices[0].delta.content for chunk in chunks[:-1]]
    assert "".join(delta for delta in deltas if delta) == whole
    assert len([delta for delta in deltas if delta]) == 2
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-2:] == [None, "stop"]
    assert not chunks[-1].choices
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2
    assert not any(chunk.usage for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_models_are_listed(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == [MODEL, "chart"]


def test_adapters_of_a_folder_are_listed_as_they_come(tmp_path: Any) -> None:
    with serving(Backend(), adapter_dir=str(tmp_path)) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        assert len(client.models.list().data) == 2
        for name, file in (
            ("late", "adapter_config.json"),
            (".hidden", "adapter_config.json"),
            ("other", "x.json"),
        ):
            (tmp_path / name).mkdir()
            (tmp_path / name / file).write_text("{}")
        assert [model.id for model in client.models.list()] == [MODEL, "chart", "late"]
        assert client.chat.completions.create(**{**ask(), "model": "late"}).model == "late"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**{**ask(), "model": "../late"})


def test_images_come_from_urls_where_that_is_allowed() -> None:
    backend = Backend()
    with http_server(_Images) as images, serving(backend, allow_private_image_urls=True) as (url, _):
        status, _, _ = post(url, ask("How many?", f"{images}/ok", data_uri(png(colour="blue"))))
        assert status == 200
        assert backend.requests[-1].images == [png(), png(colour="blue")]


# --- what is refused -----------------------------------------------------------------------------


class _Images(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/slow":
            for _ in range(400):
                with contextlib.suppress(OSError):
                    self.wfile.write(b"H")
                time.sleep(0.02)
            return
        self.send_response(302 if self.path.startswith("/to") else 200)
        if self.path == "/to-private":
            self.send_header("Location", "http://127.0.0.1/")
        self.end_headers()
        self.wfile.write(png() if self.path == "/ok" else bytes(2**22))

    def log_message(self, format: str, *args: object) -> None:
        pass


def says(role: str, content: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": role, "content": content}]}


def user(content: Any) -> dict[str, Any]:
    return says("user", content)


IMAGE = {"type": "image_url", "image_url": {"url": data_uri(png())}}
TEXT = {"type": "text", "text": "How many?"}

BAD: dict[str, tuple[int, bytes | dict[str, Any]]] = {
    "no body": (422, b""),
    "broken JSON": (400, b'{"model": "fake", "messages": ['),
    "not JSON": (400, b"model=fake"),
    "not UTF-8": (400, b'{"model": "\xff\xfe"}'),
    "deep JSON": (400, b"[" * 100_000),
    "a list": (422, b"[]"),
    "null": (422, b"null"),
    "no fields": (422, {}),
    "no model": (422, {"messages": [{"role": "user", "content": "hi"}]}),
    "no messages": (422, {"model": MODEL}),
    "0 messages": (422, {"model": MODEL, "messages": []}),
    "messages of a wrong type": (422, {"model": MODEL, "messages": "hi"}),
    "a message without content": (422, {"model": MODEL, "messages": [{"role": "user"}]}),
    "content of a wrong type": (422, user(3)),
    "empty content": (400, user("")),
    "no content": (400, user([])),
    "an unknown part": (422, user([{"type": "video", "video": "x"}])),
    "a part without type": (422, user([{"text": "x"}])),
    "an image part without URL": (422, user([{"type": "image_url", "image_url": {}}])),
    "unsupported role": (422, says("tool", "x")),
    "an image of the assistant": (400, says("assistant", [IMAGE])),
    "only a system message": (400, says("system", "x")),
    "lone surrogate": (422, rb'{"model": "fake", "messages": [{"role": "user", "content": "\ud800"}]}'),
    "unknown model": (404, ask(model="gpt")),
    "a path for a model": (404, ask(model="../../etc")),
    "NaN temperature": (422, json.dumps(ask(temperature=float("nan"))).encode()),
    "infinite top_p": (422, json.dumps(ask(top_p=float("inf"))).encode()),
    "negative temperature": (422, ask(temperature=-1)),
    "temperature of a wrong type": (422, ask(temperature="hot")),
    "top_p of 0": (422, ask(top_p=0)),
    "negative max_tokens": (422, ask(max_tokens=-5)),
    "max_tokens of 0": (422, ask(max_tokens=0)),
    "fractional max_tokens": (422, ask(max_tokens=1.5)),
    "huge max_tokens": (400, ask(max_tokens=10**9)),
    "seed beyond 64 bits": (422, ask(seed=2**70)),
    "two answers": (422, ask(n=2)),
    "empty stop": (400, ask(stop="")),
    "too many stops": (400, ask(stop=[str(number) for number in range(99)])),
    "stop of a wrong type": (422, ask(stop=[1])),
    "tools": (400, ask(tools=[{"type": "function", "function": {"name": "f"}}])),
    "JSON mode": (400, ask(response_format={"type": "json_object"})),
    "logprobs": (400, ask(logprobs=True)),
    "stream_options without stream": (400, ask(stream_options={"include_usage": True})),
    "too many images": (400, user([IMAGE] * 4 + [TEXT])),
    "a local path": (400, ask("x", "/etc/hostname")),
    "a file URL": (400, ask("x", "file:///etc/hostname")),
    "an ftp URL": (400, ask("x", "ftp://example.com/a.png")),
    "a broken URL": (400, ask("x", "http://[bad")),
    "the metadata service": (400, ask("x", "http://169.254.169.254/latest/meta-data")),
    "loopback": (400, ask("x", "http://127.0.0.1:1/a.png")),
    "loopback by name": (400, ask("x", "http://localhost:1/a.png")),
    "loopback as a number": (400, ask("x", "http://2130706433/a.png")),
    "IPv6 loopback": (400, ask("x", "http://[::ffff:127.0.0.1]/a.png")),
    "no image": (400, ask("x", data_uri(b"hello"))),
    "an empty image": (400, ask("x", "data:image/png;base64,")),
    "broken base64": (400, ask("x", "data:image/png;base64,!!!")),
    "half an image": (400, ask("x", data_uri(png((300, 300))[:60]))),
    "50,000 x 50,000 pixels": (400, ask("x", data_uri(huge_png(50_000, 50_000)))),
    "an SVG": (400, ask("x", data_uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"))),
    "a long text": (400, ask("x" * 300_000)),
    "a body of 2 MB": (413, ask("x" * 2**21)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_told_apart(url: str, name: str) -> None:
    status, body = BAD[name]
    started = time.monotonic()
    found, answer, _ = post(url, body)
    assert found == status, answer
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer["error"]["message"]
    assert len(answer["error"]["message"]) < 700
    assert time.monotonic() - started < 5
    assert post(url, ask())[0] == 200


@pytest.mark.parametrize("path", ["slow", "endless", "to-private"])
def test_bad_image_hosts_are_bounded(path: str) -> None:
    """A host that trickles, one that sends too much, and one that sends the server to itself."""
    options: dict[str, Any] = {
        "allow_private_image_urls": True,
        "image_timeout_s": 0.5,
        "max_body_bytes": 2**20,
    }
    with http_server(_Images) as images, serving(Backend(), **options) as (url, _):
        started = time.monotonic()
        status, answer, _ = post(url, ask("x", f"{images}/{path}"))
        assert status == 400, answer
        assert time.monotonic() - started < 3


def test_100_mb_without_a_declared_length_are_not_kept(url: str) -> None:
    before = psutil.Process().memory_info().rss
    connection = HTTPConnection(url.removeprefix("http://"), timeout=20)
    connection.putrequest("POST", "/v1/chat/completions")
    for name, value in (("Transfer-Encoding", "chunked"), ("Authorization", f"Bearer {KEY}")):
        connection.putheader(name, value)
    connection.endheaders()
    block = b"100000\r\n" + bytes(2**20) + b"\r\n"
    with contextlib.suppress(OSError):  # refused before all was sent
        for _ in range(100):
            connection.send(block)
        connection.send(b"0\r\n\r\n")
    with contextlib.suppress(OSError):
        assert connection.getresponse().status == 413
    connection.close()
    assert psutil.Process().memory_info().rss - before < 60 * 2**20
    assert post(url, ask())[0] == 200


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", f"Basic {KEY}", f"bearer  {KEY}x"])
def test_the_key_is_needed(url: str, header: str) -> None:
    status, answer, headers = post(url, ask(), {"Authorization": header})
    assert status == 401
    assert answer["error"]["type"] == "authentication_error"
    assert headers["www-authenticate"] == "Bearer"


def test_health_and_page_need_no_key(url: str) -> None:
    connection = HTTPConnection(url.removeprefix("http://"), timeout=20)
    for path, status in (
        ("/health", 200),
        ("/", 200),
        ("/openapi.json", 200),
        ("/v1/models", 401),
        ("/metrics", 401),
    ):
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        assert response.status == status, path
    connection.close()


def test_unknown_paths_and_methods_are_errors_of_the_same_form(url: str) -> None:
    assert post(url, {}, path="/v1/embeddings")[:2] == (
        404, {"error": {"message": "Not Found", "type": "not_found_error", "param": None, "code": None}}
    )  # fmt: skip
    assert post(url, {}, path="/v1/models")[0] == 405


# --- load, failures and the end ------------------------------------------------------------------


def test_a_full_queue_is_a_503_that_says_when_to_come_back(url: str, backend: Backend) -> None:
    backend.busy = True
    try:
        status, answer, headers = post(url, ask())
    finally:
        backend.busy = False
    assert (status, headers["retry-after"]) == (503, "1")
    assert answer["error"]["message"] == "too many requests are waiting"


def test_a_stream_that_breaks_says_so_without_details(
    url: str, client: openai.OpenAI, backend: Backend
) -> None:
    backend.break_after = 1
    try:
        with pytest.raises(openai.APIError, match="the answer broke off"):
            list(client.chat.completions.create(**ask(), stream=True))
        backend.break_after = 0
        status, answer, _ = post(url, ask(stream=True))
        assert (status, answer["error"]["message"]) == (500, "the server failed; its log says why")
    finally:
        backend.break_after = None


def test_draining_answers_what_is_in_progress_and_refuses_the_rest() -> None:
    backend = Backend()
    backend.open.clear()
    with serving(backend) as (url, gateway):
        answers: list[int] = []
        threads = [
            threading.Thread(target=lambda body=body: answers.append(read_all(url, body)))
            for body in (ask(), ask(stream=True))
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(backend.requests) == 2)
        gateway.draining = True
        assert post(url, ask())[0] == 503
        backend.open.set()
        assert asyncio.run(gateway.drain(10)) == 0
        for thread in threads:
            thread.join()
        assert answers == [200, 200]


@contextlib.contextmanager
def asking(url: str, body: dict[str, Any]) -> Iterator[HTTPConnection]:
    """A request that was sent; leaving the block closes the connection, whatever has come of it."""
    connection = HTTPConnection(url.removeprefix("http://"), timeout=20)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    try:
        yield connection
    finally:
        connection.close()


def figures(gateway: Gateway) -> dict[str, float]:
    """The gateway's metrics by name and labels."""
    lines = generate_latest(gateway.metrics.registry).decode().splitlines()
    values = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in values}


IN_PROGRESS = ("vlmray_requests_in_flight", 'vlmray_requests_queued{model="fake"}')
LEFT = 'vlmray_requests_total{model="fake",status="499"}'


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(stream: bool, begun: bool) -> None:
    backend = Backend()
    (backend.flowing if begun and stream else backend.open).clear()
    with serving(backend) as (url, gateway):
        with asking(url, ask(stream=stream)) as connection:
            wait_for(lambda: backend.requests)
            assert figures(gateway)[IN_PROGRESS[0]] == 1
            if begun and stream:
                response = connection.getresponse()
                assert response.readline().startswith(b"data: ")
                response.close()
        wait_for(lambda: backend.num_given_up == 1)
        wait_for(lambda: gateway.metrics.num_in_flight == 0)
        found = figures(gateway)
        assert [found[name] for name in (*IN_PROGRESS, LEFT)] == [0, 0, 1]
        backend.open.set()
        backend.flowing.set()
        assert read_all(url, ask(stream=stream)) == 200
        assert backend.num_given_up == 1


def test_a_client_that_leaves_before_its_image_has_come_is_never_asked_about() -> None:
    backend = Backend()
    options: dict[str, Any] = {"allow_private_image_urls": True, "image_timeout_s": 60}
    with http_server(_Images) as images, serving(backend, **options) as (url, gateway):
        with asking(url, ask("x", f"{images}/slow", f"{images}/ok")):
            wait_for(lambda: gateway.metrics.num_in_flight == 1)
        started = time.monotonic()
        wait_for(lambda: gateway.metrics.num_in_flight == 0)
        assert time.monotonic() - started < 4  # the host takes twice as long
        assert figures(gateway)[LEFT] == 1
        assert post(url, ask("x", f"{images}/ok"))[0] == 200
        assert len(backend.requests) == 1


def test_a_server_that_cancels_the_application_ends_the_request_too() -> None:
    """What Serve does, for clients that leave and for requests that take longer than they may."""
    backend = Backend()
    backend.open.clear()
    config = ServeConfig(model_id=MODEL)
    gateway = Gateway(config, backend)
    body = [{"type": "http.request", "body": json.dumps(ask(stream=True)).encode(), "more_body": False}]
    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip

    async def receive() -> Any:
        return body.pop() if body else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        raise AssertionError("nothing is there to be sent")

    async def check() -> None:
        request = asyncio.create_task(build_app(gateway)(scope, receive, send))
        while not backend.requests:
            await asyncio.sleep(0.01)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(check())
    found = figures(gateway)
    assert [found[name] for name in (*IN_PROGRESS, LEFT)] == [0, 0, 1]
    assert backend.num_given_up == 1


def test_nothing_is_left_of_many_clients_that_come_and_leave() -> None:
    """Some leave at once or after a random time, some in the middle of a stream; others read to the end."""
    backend, chance = Backend(), random.Random(0)
    backend.flowing.clear()  # a stream stops behind its first word

    def visit(number: int) -> str | None:
        kind, images = number % 4, [data_uri(png())] * (number % 3)
        with asking(url, ask("x", *images, stream=kind == 2 or number % 8 == 0)) as connection:
            if kind == 1:
                time.sleep(chance.uniform(0, 0.05))
            if kind < 2:
                return None
            response = connection.getresponse()
            with contextlib.closing(response):
                return str(response.readline() if kind == 2 else json.load(response)["choices"])

    with serving(backend) as (url, gateway):
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(visit, range(300)))
        assert post(url, ask())[0] == 200  # those before it have been taken by then
        wait_for(lambda: gateway.metrics.num_in_flight == 0)
        assert all("data: " in str(text) for text in found[2::4])
        for num_images in range(3):
            assert len(set(found[3::4][num_images::3])) == 1
        counted = figures(gateway)
        assert [counted[name] for name in IN_PROGRESS] == [0, 0]
        assert backend.num_given_up <= counted[LEFT]  # some left while their images were read
        assert counted[LEFT] >= 75
        assert 75 < counted['vlmray_requests_total{model="fake",status="200"}'] <= 301 - counted[LEFT]
        backend.flowing.set()
        assert read_all(url, ask(stream=True)) == 200


def test_metrics_count_what_happened() -> None:
    with serving(Backend(), key=None) as (url, _):
        for body in (ask(), ask(stream=True), ask(model="chart"), ask(model="x" * 9), ask(max_tokens=-1)):
            read_all(url, body)
        connection = HTTPConnection(url.removeprefix("http://"), timeout=20)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
    assert 'vlmray_requests_total{model="fake",status="200"} 2.0' in text
    assert 'vlmray_requests_total{model="chart",status="200"} 1.0' in text
    assert 'vlmray_requests_total{model="",status="404"} 1.0' in text
    assert 'vlmray_completion_tokens_total{model="fake"} 4.0' in text
    assert 'vlmray_time_to_first_token_seconds_count{model="fake"} 1.0' in text
    assert 'vlmray_batch_size_bucket{le="1.0",model="chart"} 1.0' in text
    assert "vlmray_requests_in_flight 0.0" in text
    assert "xxxxxxxxx" not in text


def read_all(url: str, body: dict[str, Any]) -> int:
    """Ask, read the answer whatever it is, and return its status."""
    connection = HTTPConnection(url.removeprefix("http://"), timeout=20)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_no_generated_request_breaks_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests made from the OpenAPI document, valid and not, get answers that the document has."""

    async def find(self: Gateway, name: str) -> None:
        """Know every model: a generated name would end nearly all requests there."""

    monkeypatch.setattr(Gateway, "_find_adapter", find)
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    options = ["--checks", checks, "--max-examples", "100", "--seed", "1", "--no-color"]
    backend = Backend()
    with serving(backend, max_body_bytes=2**20) as (url, _):
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", *options]
        key = ["-H", f"Authorization: Bearer {KEY}"]
        result = subprocess.run([*command, *key], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert len(backend.requests) > 10
