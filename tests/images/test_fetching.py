"""Fetching: bounded in time, size and redirects, every failure one named error."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from helpers.processes import http_server
from vlmray.images.fetching import MAX_REDIRECTS, FetchError, fetch_url, is_public

BODY = bytes(range(100))


def fetch(url: str, **options: Any) -> bytes:
    return fetch_url(url, **({"max_bytes": 1000, "timeout_s": 10.0} | options))


class _Handler(BaseHTTPRequestHandler):
    """Serves the cases of this file by path."""

    def do_GET(self) -> None:
        name = self.path.strip("/").partition("?")[0]
        redirects = {
            "redirect": "/ok",
            "to-file": "file:///etc/hostname",
            "to-ftp": "ftp://host/x",
            "loop": "/loop",
            "to-nowhere": "http://[bad",
            "to-other": "http://127.0.0.2:9/ok",
        }
        if name in redirects:
            self._answer(b"", status=302, location=redirects[name])
        elif name in ("trickle", "trickle-close", "trickle-headers"):
            self._trickle(name)
        elif name == "endless":
            self._endless()
        elif name == "short":
            self._answer(BODY[:-9], content_length=str(len(BODY)))
        elif name == "no-length":
            self._answer(BODY, content_length=None)
        elif name == "garbage":
            self.wfile.write(b"no http at all\r\n\r\n")
        else:
            bodies = {
                "ok": BODY,
                "caf%C3%A9%20bar": BODY,
                "agent": self._agent(),
            }
            self._answer(bodies.get(name, b"not here"), status=200 if name in bodies else 404)

    def _agent(self) -> bytes:
        return self.headers["User-Agent"].encode()

    def _answer(self, body: bytes, status: int = 200, **headers: str | None) -> None:
        self.send_response(status)
        for key, value in {"content_length": str(len(body)), **headers}.items():
            if value is not None:
                self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _trickle(self, name: str) -> None:
        """Send a byte every 20 ms for 3 s: never idle for long enough to trip a socket timeout."""
        if name != "trickle-headers":
            self.send_response(200)
            if name == "trickle":
                self.send_header("Content-Length", "1000")
            self.end_headers()
        else:
            self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
        for _ in range(150):
            try:
                self.wfile.write(b"x")
            except OSError:
                return
            time.sleep(0.02)

    def _endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        for _ in range(2000):
            try:
                self.wfile.write(bytes(10_000))
            except OSError:
                return

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http_server(_Handler) as url:
        yield url


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.mark.parametrize("path", ["ok", "ok?size=1#part", "redirect", "no-length", "café bar"])
def test_urls(server: str, path: str) -> None:
    assert fetch(f"{server}/{path}") == BODY


def test_downloads_say_who_asks(server: str) -> None:
    assert fetch(f"{server}/agent") == b"vlmray"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gone", "HTTP 404 for http://127.0.0.1:.*/gone"),
        ("short", r"truncated: \d+ of \d+ bytes from"),
        ("garbage", "cannot fetch"),
        ("to-file", "unsupported URL scheme 'file'; expected http or https"),
        ("to-ftp", "unsupported URL scheme 'ftp'"),
        ("to-nowhere", "cannot fetch http://.*/to-nowhere: Invalid IPv6 URL"),
        ("loop", f"more than {MAX_REDIRECTS} redirects from http://.*/loop"),
    ],
)
def test_bad_answers_are_named(server: str, path: str, message: str) -> None:
    with pytest.raises(FetchError, match=message):
        fetch(f"{server}/{path}")


def test_refused_connection() -> None:
    with pytest.raises(FetchError, match=r"cannot fetch http://127\.0\.0\.1:9/a\.png: .*refused"):
        fetch("http://127.0.0.1:9/a.png")


@pytest.mark.parametrize("path", ["endless", "ok"])
def test_bodies_are_cut_at_max_bytes(server: str, path: str) -> None:
    limit = 100_000 if path == "endless" else 40
    with pytest.raises(FetchError, match=f"bytes or more exceeds the limit of {limit} bytes"):
        fetch(f"{server}/{path}", max_bytes=limit)


@pytest.mark.parametrize("path", ["trickle", "trickle-close", "trickle-headers"])
def test_the_deadline_holds_for_the_whole_answer(server: str, path: str) -> None:
    started = time.monotonic()
    with pytest.raises(FetchError, match=r"no complete answer in 0\.2 s from http://.*/trickle"):
        fetch(f"{server}/{path}", timeout_s=0.2)
    assert time.monotonic() - started < 1.5


def test_no_threads_are_left_behind(server: str) -> None:
    before = {thread.name for thread in threading.enumerate() if isinstance(thread, threading.Timer)}
    fetch(f"{server}/ok", timeout_s=60)
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer) and thread.name not in before:
            thread.join(timeout=1)
            assert not thread.is_alive()


def test_messages_do_not_show_the_query_of_a_url(server: str) -> None:
    with pytest.raises(FetchError) as caught:
        fetch(f"{server}/gone?signature=secret")
    assert "secret" not in str(caught.value)


PUBLIC = ["8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8", "64:ff9b::808:808"]
PRIVATE = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1",
    "169.254.169.254", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fd00::1",
    "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::",
    "2002:a9fe:a9fe::",
]  # fmt: skip


@pytest.mark.parametrize(("ip", "public"), [*((ip, True) for ip in PUBLIC), *((ip, False) for ip in PRIVATE)])
def test_public_addresses_are_told_from_others(ip: str, public: bool) -> None:
    assert is_public(ip) == public


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "0"])
def test_private_addresses_are_not_connected_to(
    server: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server)  # which could reach it
    monkeypatch.delenv("no_proxy")
    with pytest.raises(FetchError, match="is not a public address"):
        fetch(f"http://{host}:{server.rpartition(':')[2]}/ok", public_only=True)


def test_redirects_to_private_addresses_are_not_followed(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmray.images.fetching.is_public", lambda ip: ip == "127.0.0.1")
    assert fetch(f"{server}/redirect", public_only=True) == BODY
    with pytest.raises(FetchError, match=r"127\.0\.0\.2 is not a public address"):
        fetch(f"{server}/to-other", public_only=True)
