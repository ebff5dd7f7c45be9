"""What HTTP can bring: bad requests, floods, wrong keys, unknown paths."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import subprocess
import sys
import time
from http.client import HTTPConnection
from typing import Any

import openai
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
    "unsupported role": (400, says("critic", "x")),
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
    "an unknown form": (400, ask(response_format={"type": "xml"})),
    "a form of all memory": (400, ask(structured_outputs={"json": {"type": "array", "maxItems": 10**9}})),
    "a form that cannot be compiled": (400, ask(structured_outputs={"regex": "("})),
    "likeliest tokens alone": (400, ask(top_logprobs=2)),
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


def get(url: str, path: str, method: str = "GET", **headers: str) -> tuple[int, str, dict[str, str]]:
    """Return status, body and headers of a request without a body."""
    connection = HTTPConnection(url.removeprefix("http://"), timeout=20)
    connection.request(
        method, path, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )
    response = connection.getresponse()
    found = response.status, response.read().decode(), {k.lower(): v for k, v in response.headers.items()}
    connection.close()
    return found


BEARER = f"Bearer {KEY}"
OPEN = ("/health", "/ready", "/", "/docs", "/openapi.json")


def test_health_and_pages_need_no_key(url: str) -> None:
    assert [get(url, path)[0] for path in OPEN] == [200] * 5
    for path in ("/v1/models", "/v1/models/fake", "/metrics", "//v1/models", "/v1//models"):
        assert get(url, path)[0] == 401
        assert get(url, path, Authorization=BEARER)[0] == 200


@pytest.mark.parametrize("path", [*OPEN, "/v1/models", "/v1/models/fake", "/metrics"])
def test_head_is_get_without_a_body(url: str, path: str) -> None:
    whole, head = (get(url, path, method, Authorization=BEARER) for method in ("GET", "HEAD"))
    assert (head[0], head[1]) == (200, "")
    assert head[2]["content-type"] == whole[2]["content-type"]
    assert get(url, "/v1/nothing", "HEAD", Authorization=BEARER)[0] == 404
    assert get(url, "/v1/chat/completions", "HEAD", Authorization=BEARER)[0] == 405


@pytest.mark.parametrize("path", ["//v1/chat/completions", "/v1//chat/completions", "/v1/chat/completions/"])
def test_slashes_too_many_are_forgiven(url: str, path: str) -> None:
    assert post(url, ask(), path=path)[0] == 200
    client = openai.OpenAI(base_url=f"{url}/v1/", api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list()] == [MODEL, "chart"]


@pytest.mark.parametrize("name", ["org/model", "/data/model", "fake?answer=a//b", "models/mine/"])
def test_a_model_is_described_whatever_its_name(name: str) -> None:
    backend = Backend()
    backend.engine.max_model_len = 77
    with serving(backend, served_model_name=name) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        assert client.models.retrieve(name).id == name
        assert client.models.retrieve("chart").to_dict()["max_model_len"] == 77
        assert [card.to_dict()["max_model_len"] for card in client.models.list()] == [77, 77]
        with pytest.raises(openai.NotFoundError, match="does not exist; known:") as refused:
            client.models.retrieve("none/such")
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


def test_ready_is_when_a_model_can_answer() -> None:
    backend = Backend()
    backend.ready = False
    with serving(backend) as (url, gateway):
        assert get(url, "/health")[0] == 200
        status, text, headers = get(url, "/ready")
        assert (status, headers["retry-after"]) == (503, "2")
        assert "no model can answer yet" in text
        backend.ready = True
        assert get(url, "/ready")[0] == 200
        gateway.draining = True
        assert [get(url, path)[0] for path in ("/health", "/ready")] == [200, 503]


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/json; a=b"]
)
def test_json_is_taken_whatever_it_is_called(url: str, kind: str | None) -> None:
    connection = HTTPConnection(url.removeprefix("http://"), timeout=20)
    connection.putrequest("POST", "/v1/chat/completions")
    data = json.dumps(ask()).encode()
    headers = {
        "Authorization": BEARER,
        "Content-Length": str(len(data)),
        **({"Content-Type": kind} if kind else {}),
    }
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders(data)
    assert connection.getresponse().status == 200
    connection.close()


BODIES: dict[str, tuple[int, bytes, dict[str, str], str]] = {
    "a form": (400, b"a=b", {"Content-Type": "application/x-www-form-urlencoded"}, "sent as application/x-"),
    "gzip": (415, gzip.compress(b"{}"), {"Content-Encoding": "gzip"}, "Content-Encoding: gzip"),
    "br": (415, b"{}", {"Content-Encoding": "br"}, "Content-Encoding: br"),
    "nothing": (400, b"", {}, "it is empty"),
    "NaN": (400, b'{"temperature": NaN}', {}, "NaN is no number"),
    "Infinity": (400, b'{"user": -Infinity}', {}, "-Infinity is no number"),
    "a key twice": (400, b'{"model": "a", "messages": [], "model": "b"}', {}, "'model' is given twice"),
    "a key twice, deep": (400, b'{"messages": [{"role": "a", "role": "b"}]}', {}, "'role' is given twice"),
    "deep": (400, b'{"a": ' * 5000 + b"1" + b"}" * 5000, {}, "nested too deeply"),
    "deep template": (
        400, json.dumps(ask(chat_template_kwargs={"a": "DEEP"})).encode().replace(
            b'"DEEP"', b"[" * 200 + b"]" * 200), {}, "nested too deeply"),
    "a long number": (400, b'{"seed": ' + b"9" * 5000 + b"}", {}, "not JSON"),
    "UTF-16": (400, json.dumps(ask()).encode("utf-16"), {}, "not UTF-8"),
    "a surrogate in UTF-8": (400, b'{"model": "\xed\xa0\x80"}', {}, "not UTF-8"),
    "a list": (400, b"[1]", {}, "the body is a list"),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_what_is_no_json_is_refused_in_words(url: str, name: str) -> None:
    status, body, headers, words = BODIES[name]
    found, answer, _ = post(url, body, headers)
    assert found == status
    assert words in answer["error"]["message"]
    assert post(url, ask())[0] == 200


SURROGATES: dict[str, tuple[dict[str, Any], str]] = {
    "text": (user("a HALF"), "messages[0].content"),
    "part": (user([{"type": "text", "text": "HALF"}]), "messages[0].content[0].text"),
    "stop": (ask(stop=["a", "HALF"]), "stop[1]"),
    "model": ({**ask(), "model": "HALF"}, "model"),
    "template": (ask(chat_template_kwargs={"a": ["HALF"]}), "chat_template_kwargs.a[0]"),
    "user": (ask(user="HALF"), "user"),
    "unknown": (ask(something={"deep": [{"a": "HALF"}]}), "something.deep[0].a"),
    "key": (ask(metadata={"HALF": 1}), "metadata"),
    "URL": (ask("x", "http://a/HALF"), "messages[0].content[0].image_url.url"),
}


@pytest.mark.parametrize("half", ["\\ud83d", "\\uDE00", "\\udc00\\ud800"])
@pytest.mark.parametrize("name", SURROGATES)
def test_half_a_character_is_refused_wherever_it_is(url: str, name: str, half: str) -> None:
    body, param = SURROGATES[name]
    status, answer, _ = post(url, json.dumps(body).replace("HALF", half).encode())
    assert (status, answer["error"]["param"]) == (400, param)
    assert "half a surrogate pair" in answer["error"]["message"]
    assert post(url, json.dumps(ask("HALF")).replace("HALF", "\\ud83d\\ude00").encode())[0] == 200


def test_the_documents_need_no_other_machine(url: str) -> None:
    _, page, headers = get(url, "/docs")
    for name in ("/v1/chat/completions", "ChatRequest", "top_k", "chat_template_kwargs", "max_model_len"):
        assert name in page
    assert "//" not in page.replace("data:,", "")
    assert "<script" not in page
    assert "default-src 'none'" in headers["content-security-policy"]
    links = set(re.findall(r"href='#(\w+)'", page))
    assert links <= set(re.findall(r"<h2 id='(\w+)'", page))
    assert {"ChatRequest", "Message"} <= links


def test_pages_of_allowed_origins_may_ask(backend: Backend) -> None:
    mine, other = "https://app.example.com", "https://evil.example.com"
    asks = {
        "Access_Control_Request_Method": "POST",
        "Access_Control_Request_Headers": "authorization,x-stainless-os",
    }
    with serving(backend, allowed_origins=f"{mine},http://localhost:3000") as (url, _):
        for origin in (mine, "http://localhost:3000"):
            status, _, headers = get(url, "/v1/chat/completions", "OPTIONS", Origin=origin, **asks)
            assert (status, headers["access-control-allow-origin"]) == (200, origin)
            assert "authorization" in headers["access-control-allow-headers"]
        assert get(url, "/v1/chat/completions", "OPTIONS", Origin=other, **asks)[0] == 400
        assert post(url, ask(), {"Origin": mine})[2]["access-control-allow-origin"] == mine
        assert (
            get(url, "/v1/models", Origin=mine)[2]["access-control-allow-origin"] == mine
        )  # a 401, to be read
        assert "access-control-allow-origin" not in get(url, "/health", Origin=other)[2]
    with serving(backend, allowed_origins="*") as (url, _):
        assert get(url, "/health", Origin=other)[2]["access-control-allow-origin"] == "*"


def test_no_page_may_ask_unless_it_is_allowed(url: str) -> None:
    origin, asks = "https://app.example.com", {"Access_Control_Request_Method": "POST"}
    status, _, headers = get(url, "/v1/chat/completions", "OPTIONS", Origin=origin, **asks)
    assert status == 401
    assert "access-control-allow-origin" not in headers


def test_a_wrong_key_is_told_from_none(url: str) -> None:
    assert "there is no API key" in get(url, "/v1/models")[1]
    assert "this API key is wrong" in get(url, "/v1/models", Authorization="Bearer x")[1]


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
