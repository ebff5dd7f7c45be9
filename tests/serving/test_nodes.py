"""A server on several nodes: gateways, replicas and a node are killed, and nobody's request is lost.

Clients ask the head, as the nodes of this cluster share a machine, and a port but for the head's.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest import mock

import openai
import psutil
import pytest
import requests
from ray.cluster_utils import Cluster

from helpers.clusters import cluster_of, joining, lose
from helpers.paths import ROOT
from helpers.processes import descendants, free_port, is_alive, wait_until

KEY = "open sesame"
WORDS = 400
MODEL = f"fake?answer={'+'.join('x' * WORDS)}&token_s=0.02"
NUM_CLIENTS = 16
LATER_S = 5.0


@dataclass
class Served:
    """A server, its cluster, and how both are reached."""

    cluster: Cluster
    process: subprocess.Popen[str]
    url: str
    workers_url: str
    """The other nodes' proxies; each connection is taken by one of them."""

    def ask(self, words: int = 3, url: str = "", key: str = KEY) -> int:
        body = {
            "model": "fake", "max_tokens": words, "messages": [{"role": "user", "content": "hi"}]
        }  # fmt: skip
        headers = {"Authorization": f"Bearer {key}"}
        url = f"{url or self.url}/v1/chat/completions"
        return requests.post(url, json=body, headers=headers, timeout=60).status_code

    def get(self, path: str, url: str = "") -> requests.Response:
        headers = {"Authorization": f"Bearer {KEY}"}
        return requests.get(f"{url or self.url}{path}", headers=headers, timeout=60)

    def counted(self, status: int) -> dict[str, float]:
        """How many requests each gateway has answered with a status."""
        pattern = rf'requests_total{{gateway="(\w+)",model="\w*",status="{status}"}} (\S+)'
        return {gateway: float(value) for gateway, value in re.findall(pattern, self.get("/metrics").text)}

    def num_gateways(self) -> int:
        return len(set(re.findall(r'requests_in_flight{gateway="(\w+)"', self.get("/metrics").text)))

    def processes(self, deployment: str) -> list[psutil.Process]:
        """Replicas of a deployment, those of the head's node first."""
        head = raylets(self.cluster.head_node)
        found = descendants(f"ServeReplica:vlmray:{deployment}")
        return sorted(found, key=lambda process: process.ppid() not in head)


def raylets(node: Any) -> set[int]:
    return {info.process.pid for info in node.all_processes["raylet"]}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A server of two replicas on a head without CPUs and two nodes with a GPU each."""
    own_port = {"RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(free_port())}
    node = {"num_cpus": 1, "num_gpus": 1}
    with (
        mock.patch.dict(os.environ, own_port),
        cluster_of(node, node) as cluster,
        serving(cluster, free_port()) as served,
    ):
        wait_until(lambda: served.num_gateways() == 3)
        yield served


@contextlib.contextmanager
def serving(cluster: Cluster, port: int) -> Iterator[Served]:
    command = [
        sys.executable, str(ROOT / "jobs" / "serve.py"), "--engine", "fake", "--model_id", MODEL,
        "--served_model_name", "fake", "--max_batch_size", "4", "--port", str(port),
    ]  # fmt: skip
    env = {**os.environ, **joining(cluster), "VLMRAY_API_KEY": KEY}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stdout is not None
        assert "is served at" in process.stdout.readline()
        workers_url = f"http://127.0.0.1:{os.environ['RAY_SERVE_WORKER_PROXY_HTTP_PORT']}"
        yield Served(cluster, process, f"http://127.0.0.1:{port}", workers_url)
    finally:
        process.kill()
        process.communicate()


def ask_while(served: Served, num_requests: int, disturb: Callable[[], Any]) -> list[float]:
    """Ask from 16 clients, disturb after a quarter; return how long each took, which has to be answered.

    These are plain clients that ask once: OpenAI's own ask again by themselves.
    """
    took: list[tuple[float, int]] = []

    def ask(_: int) -> None:
        started = time.monotonic()
        status = served.ask()
        took.append((time.monotonic() - started, status))

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        answers = pool.map(ask, range(num_requests))
        wait_until(lambda: len(took) >= num_requests // 4)
        disturb()
        list(answers)
    assert Counter(status for _, status in took) == {200: num_requests}
    return [seconds for seconds, _ in took]


def test_all_gateways_are_one_server(served: Served) -> None:
    """The key, the list of models, and the figures, whoever is asked."""
    before = sum(served.counted(200).values())
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        urls = [served.url, served.workers_url] * 20
        assert set(pool.map(lambda url: served.ask(url=url), urls)) == {200}
        for url in (served.url, served.workers_url):
            assert sum(served.counted(200).values()) == before + 40, url
        wait_until(
            lambda: [
                served.ask(url=url, key="wrong") for url in (served.url, served.workers_url)
            ] == [401, 401] and len(served.counted(401)) == 3
        )  # fmt: skip
    lists = [served.get("/v1/models", url).json() for url in (served.url, served.workers_url)]
    assert lists[0] == lists[1]
    assert served.get("/ready", served.workers_url).status_code == 200


def test_a_killed_gateway_loses_nothing_but_streams_that_have_begun(served: Served) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=60)
    victim = served.processes("gateway")[0]

    def stream() -> None:
        chunks = client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "hi"}], stream=True, max_tokens=WORDS
        )
        next(chunks)
        begun.set()
        with pytest.raises(openai.APIError, match="the answer broke off"):
            list(chunks)

    begun = threading.Event()

    def kill() -> None:
        assert begun.wait(60)
        victim.kill()

    with ThreadPoolExecutor(1) as pool:
        streamed = pool.submit(stream)
        ask_while(served, 120, kill)
        streamed.result()
    wait_until(lambda: served.num_gateways() == 3)


def test_a_killed_replica_loses_nothing(served: Served) -> None:
    victim = served.processes("model")[0]
    ask_while(served, 120, victim.kill)
    wait_until(lambda: len(served.processes("model")) == 2 and not is_alive(victim))


def test_a_killed_node_loses_nothing_and_nobody_waits_long(served: Served) -> None:
    raylet = served.processes("model")[0].ppid()
    (node,) = (each for each in served.cluster.worker_nodes if raylet in raylets(each))
    took = ask_while(served, 600, lambda: lose(served.cluster, node))
    assert max(took) - statistics.quantiles(took, n=20)[-1] < LATER_S
    wait_until(lambda: served.num_gateways() == 2)


def test_a_stop_cuts_nothing_off_at_any_gateway(served: Served) -> None:
    urls = [served.url, served.workers_url]
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        answers = [pool.submit(served.ask, 50, urls[number % 2]) for number in range(NUM_CLIENTS)]
        wait_until(lambda: served_in_flight(served) == NUM_CLIENTS)
        served.process.send_signal(signal.SIGTERM)
        for url in urls:
            wait_until(lambda url=url: served.get("/ready", url).status_code == 503)
        refused = [served.ask(url=url) for url in urls]
        assert [answer.result() for answer in answers] == [200] * NUM_CLIENTS
    assert refused == [503, 503]
    assert served.process.wait(60) == 0


def served_in_flight(served: Served) -> float:
    found = re.findall(r"requests_in_flight{\S+ (\S+)", served.get("/metrics").text)
    return sum(map(float, found))


def test_a_killed_driver_leaves_nothing_behind(served: Served) -> None:
    with serving(served.cluster, free_port()) as another:
        another.process.kill()
        actors = ("ray::ServeController", "ray::ProxyActor", "ray::ServeReplica")
        wait_until(lambda: not any(map(descendants, actors)))
