"""Clients of other makers, in environments of their own: `make clients` sets them up and runs this."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from helpers.charts import dataset
from helpers.paths import ROOT
from helpers.processes import free_port
from vlmray.config import ServeConfig
from vlmray.serving.server import API_KEY, Server, serve_app

HERE = Path(__file__).parent
ENVIRONMENT = os.environ.get("VLMRAY_CLIENTS", "")
pytestmark = [
    pytest.mark.skipif(not ENVIRONMENT, reason="run by make clients, which sets the clients up"),
    pytest.mark.usefixtures("two_cpus"),
]

KEY = "secret"
PYTHON = ["openai (Python)", "litellm", "langchain-openai", "llama-index", "instructor", "pydantic-ai"]
JAVASCRIPT = ["openai (JavaScript)", "AI SDK"]
STRUCTURED = ["instructor", "pydantic-ai"]
JSON = 'fake?answer={"count":4}'
MODELS = {"builtin": "transformers", JSON: "fake"}
CALLS = ["image", "stream", "turns", "options", "models", "errors", "leaving", "many", "schema", "function",
         "prompted JSON"]  # fmt: skip

seen: dict[str, dict[str, str]] = defaultdict(dict)


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of one model, with a key."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv(API_KEY, KEY)
        config = ServeConfig(model_id=request.param, engine=MODELS[request.param], port=free_port())
        with serve_app(config) as server:
            yield server


def run_calls(server: Server, client: str, folder: Path) -> None:
    """Let a client make its calls, and keep what it says of each."""
    row = next(row for row in dataset() if len(row["answers"][0]) > 4)  # of several tokens
    image = folder / "image.png"
    image.write_bytes(row["image"])
    model = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY).models.list().data[0].id
    given = {
        "base_url": f"{server.url}/v1", "model": model, "image": str(image), "question": row["question"],
        "answer": ask(server, model, row["image"], row["question"]), "structured": model == JSON,
    }  # fmt: skip
    if client in JAVASCRIPT:  # node looks for packages beside the script
        command = ["node", str(shutil.copy(HERE / "calls.mjs", ENVIRONMENT))]
    else:
        command = [f"{ENVIRONMENT}/bin/python", str(HERE / "calls.py")]
    ran = subprocess.run([*command, client, json.dumps(given)], capture_output=True, text=True, timeout=300)
    found = {line["call"]: line["outcome"] for line in map(json.loads, ran.stdout.splitlines())}
    assert found, ran.stderr
    seen[client] |= found
    assert {call: outcome for call, outcome in found.items() if outcome != "ok"} == {}


def ask(server: Server, model: str, image: bytes, question: str) -> str:
    """What the client that the server is tested with otherwise gets."""
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY)
    answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": parts}])
    return str(answer.choices[0].message.content)


@pytest.mark.parametrize("server", ["builtin"], indirect=True)
@pytest.mark.parametrize("client", [*PYTHON, *JAVASCRIPT])
def test_a_client_gets_what_it_asks_for(server: Server, client: str, tmp_path: Path) -> None:
    run_calls(server, client, tmp_path)


@pytest.mark.parametrize("server", [JSON], indirect=True)
@pytest.mark.parametrize("client", STRUCTURED)
def test_a_client_reads_json_that_it_has_prompted_for(server: Server, client: str, tmp_path: Path) -> None:
    run_calls(server, client, tmp_path)


def test_the_docs_have_the_table_of_what_was_seen() -> None:
    rows = [["client", *CALLS], ["---"] * (len(CALLS) + 1)]
    for client in (*PYTHON, *JAVASCRIPT):
        outcomes = [seen[client].get(call) for call in CALLS]
        rows.append([client, *({"ok": "yes", None: "-"}.get(outcome, "no") for outcome in outcomes)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    print(table)
    assert table in (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
