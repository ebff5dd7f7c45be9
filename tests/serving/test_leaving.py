"""Clients that leave end their request, and nothing is left of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

import pytest
from prometheus_client import generate_latest

from helpers.gateways import (
    KEY,
    MODEL,
    Backend,
    Images,
    ask,
    data_uri,
    png,
    post,
    read_all,
    serving,
    wait_for,
)
from helpers.processes import http_server
from vlmray.config import ServeConfig
from vlmray.serving.gateway import Gateway
from vlmray.serving.http.app import build_app


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
    with http_server(Images) as images, serving(backend, **options) as (url, gateway):
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
