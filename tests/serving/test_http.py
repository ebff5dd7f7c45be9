"""What HTTP can bring: bad requests, floods, wrong keys, unknown paths."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from http.client import HTTPConnection
from typing import Any

import psutil
import pytest

from helpers.gateways import KEY, MODEL, Backend, Images, ask, data_uri, png, post, says, serving, user
from helpers.processes import http_server, huge_png
from vlmray.serving.gateway import Gateway


def test_images_come_from_urls_where_that_is_allowed() -> None:
    backend = Backend()
    with http_server(Images) as images, serving(backend, allow_private_image_urls=True) as (url, _):
        status, _, _ = post(url, ask("How many?", f"{images}/ok", data_uri(png(colour="blue"))))
        assert status == 200
        assert backend.requests[-1].images == [png(), png(colour="blue")]


IMAGE = {"type": "image_url", "image_url": {"url": data_uri(png())}}
TEXT = {"type": "text", "text": "How many?"}
BAD: dict[str, tuple[int, bytes | dict[str, Any]]] = {
    "no body": (400, b""),
    "broken JSON": (400, b'{"model": "fake", "messages": ['),
    "not JSON": (400, b"model=fake"),
    "not UTF-8": (400, b'{"model": "\xff\xfe"}'),
    "deep JSON": (400, b"[" * 100_000),
    "a list": (400, b"[]"),
    "null": (400, b"null"),
    "no fields": (400, {}),
    "no model": (400, {"messages": [{"role": "user", "content": "hi"}]}),
    "no messages": (400, {"model": MODEL}),
    "0 messages": (400, {"model": MODEL, "messages": []}),
    "messages of a wrong type": (400, {"model": MODEL, "messages": "hi"}),
    "a message without content": (400, {"model": MODEL, "messages": [{"role": "user"}]}),
    "content of a wrong type": (400, user(3)),
    "no content": (400, user([])),
    "an unknown part": (400, user([{"type": "video", "video": "x"}])),
    "a part without type": (400, user([{"text": "x"}])),
    "an image part without URL": (400, user([{"type": "image_url", "image_url": {}}])),
    "unsupported role": (400, says("tool", "x")),
    "an image of the assistant": (400, says("assistant", [IMAGE])),
    "lone surrogate": (400, rb'{"model": "fake", "messages": [{"role": "user", "content": "\ud800"}]}'),
    "unknown model": (404, ask(model="gpt")),
    "a path for a model": (404, ask(model="../../etc")),
    "NaN temperature": (400, json.dumps(ask(temperature=float("nan"))).encode()),
    "infinite top_p": (400, json.dumps(ask(top_p=float("inf"))).encode()),
    "negative temperature": (400, ask(temperature=-1)),
    "temperature of a wrong type": (400, ask(temperature="hot")),
    "top_p of 0": (400, ask(top_p=0)),
    "negative max_tokens": (400, ask(max_tokens=-5)),
    "max_tokens of 0": (400, ask(max_tokens=0)),
    "fractional max_tokens": (400, ask(max_tokens=1.5)),
    "huge max_tokens": (400, ask(max_tokens=10**9)),
    "seed beyond 64 bits": (400, ask(seed=2**70)),
    "two answers": (400, ask(n=2)),
    "empty stop": (400, ask(stop="")),
    "too many stops": (400, ask(stop=[str(number) for number in range(99)])),
    "stop of a wrong type": (400, ask(stop=[1])),
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
    with http_server(Images) as images, serving(Backend(), **options) as (url, _):
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
