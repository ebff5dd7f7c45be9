"""The dashboard for Grafana asks for what a running server tells Prometheus, and for nothing else."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from http.client import HTTPConnection
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from helpers.gateways import KEY, Backend, ask, post, read_all, serving
from helpers.paths import ROOT
from vlmray.serving.monitoring import Figures, exposition

DASHBOARD = json.loads((ROOT / "deploy" / "grafana.json").read_text())
PANELS = DASHBOARD["panels"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]

WORDS = {"by", "without", "on", "ignoring", "and", "or", "unless", "offset", "bool"}


@pytest.fixture(scope="module")
def told() -> dict[str, set[str]]:
    """Names and labels of the samples of a server that has answered, streamed and refused."""
    with serving(Backend()) as (url, gateway):
        assert post(url, ask())[0] == 200
        assert read_all(url, ask(stream=True)) == 200
        assert post(url, ask(model="nobody"))[0] == 404
        connection = HTTPConnection(url.removeprefix("http://"), timeout=20)
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"})
        alone = connection.getresponse().read().decode()
        connection.close()
        merged = exposition([Figures("node", list(gateway.metrics.registry.collect()))]).decode()
    found: dict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(alone):
        for sample in family.samples:
            found[sample.name] |= {*sample.labels}
    for family in text_string_to_metric_families(merged):  # as on a cluster, where each gateway has a name
        for sample in family.samples:
            assert sample.name in found
            found[sample.name] |= {*sample.labels}
    return found


def asked_for(query: str) -> tuple[set[str], set[str]]:
    """Names of the metrics, and of the labels, that a query has."""
    labels = {
        name for selector in re.findall(r"\{(.*?)\}", query) for name in re.findall(r"(\w+)\s*[=!]", selector)
    }
    grouped = re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", query)
    labels |= {name.strip() for names in grouped for name in names.split(",")}
    rest = re.sub(r"\{.*?\}|\[.*?\]|\b(?:by|without|on|ignoring)\s*\([^)]*\)", " ", query)
    names = {*re.findall(r"\b([a-zA-Z_:][\w:]*)\b(?!\s*\()", rest)}
    return names - WORDS, labels


def test_a_query_is_understood() -> None:
    query = 'histogram_quantile(0.5, sum by (le, m) (rate(a_bucket{m=~"$m", s!="x"}[$__rate]))) / b_total'
    assert asked_for(query) == ({"a_bucket", "b_total"}, {"le", "m", "s"})


@pytest.mark.parametrize("query", QUERIES)
def test_what_is_asked_is_told(query: str, told: dict[str, set[str]]) -> None:
    names, labels = asked_for(query)
    assert names
    assert names <= told.keys()
    for name in names:
        assert labels - {"le"} <= told[name]
    assert ("le" in labels) == all(name.endswith("_bucket") for name in names)
    assert query.count("(") == query.count(")")


def test_all_that_is_told_is_shown(told: dict[str, set[str]]) -> None:
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for query in QUERIES for name in asked_for(query)[0]}
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in told}
    assert {name for name in families if f"{name}_total" not in told} == shown


def test_panels_have_a_place_of_their_own() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in PANELS]
    assert len({*places}) == len(PANELS) == len({panel["id"] for panel in PANELS})
    sources: list[Any] = [panel["datasource"]["uid"] for panel in PANELS]
    assert {*sources} == {"${datasource}"}
    used = {*re.findall(r"\$(?!__)\{?(\w+)", json.dumps(PANELS))}
    assert used == {variable["name"] for variable in DASHBOARD["templating"]["list"]}
