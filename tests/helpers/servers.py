"""Clients of a server, and what it says of itself."""

from __future__ import annotations

import re
from collections import defaultdict

import openai
import requests
from ray import serve

from vlmray.serving.server import APP_NAME, Server


def make_client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def num_running() -> int:
    return serve.status().applications[APP_NAME].deployments["model"].replica_states.get("RUNNING", 0)


def figures(server: Server) -> dict[str, float]:
    """The server's metrics by name and labels, summed over its gateways."""
    found: defaultdict[str, float] = defaultdict(float)
    for name, value in each_gateways_figures(server):
        found[re.sub(r'gateway="\w+",?', "", name).replace("{}", "")] += value
    return dict(found)


def each_gateways_figures(server: Server) -> list[tuple[str, float]]:
    """The same, by gateway."""
    lines = requests.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    values = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return [(name, float(value)) for name, value in values]


def in_progress(server: Server) -> float:
    names = ("vlmray_requests_in_flight", "vlmray_requests_queued")
    return sum(value for name, value in figures(server).items() if name.startswith(names))
