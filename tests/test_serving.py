"""The server on a real Ray cluster: right answers under load, after a killed replica, and to the end."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import psutil
import pyarrow.parquet as pq
import pytest
from ray import serve

from vlmray.config import InferConfig, ServeConfig
from vlmray.engines import build_engine
from vlmray.inference import plan_inference, run_inference
from vlmray.schema import GenerationRequest
from vlmray.serving import APP_NAME, Server, serve_app
from vlmray.small_models import BUILTIN, BUILTIN_FOLDER
from vlmray.sources import ChartsSource
from vlmray.testing import build_tiny_random_adapter

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
        model_id=BUILTIN, adapters=",".join(f"{name}={path}" for name, path in adapters.items()), port=8101,
        num_replicas="2", dtype="float32", allow_private_image_urls=True, max_new_tokens=32,
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


def ask(
    client: openai.OpenAI, row: dict[str, Any], model: str = BUILTIN, url: str = "", **options: Any
) -> str:
    url = url or f"data:image/png;base64,{base64.b64encode(row['image']).decode()}"
    parts: Any = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": row["question"]}]
    messages: Any = [{"role": "user", "content": parts}]
    completion = client.chat.completions.create(model=model, messages=messages, **options)
    return completion.choices[0].message.content or ""


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def num_running() -> int:
    return serve.status().applications[APP_NAME].deployments["model"].replica_states.get("RUNNING", 0)


def replica_processes() -> list[psutil.Process]:
    title = f"ServeReplica:{APP_NAME}:model"
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if title in " ".join(process.info["cmdline"] or [])
    ]


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
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{files.server_port}/chart.png"
        assert ask(client, row, url=url) == expected
        parts: Any = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": row["question"]},
        ]
        chunks = client.chat.completions.create(
            model=BUILTIN, messages=[{"role": "user", "content": parts}], stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        files.shutdown()


def test_500_requests_are_each_answered_right_though_a_replica_is_killed(
    server: Server, client: openai.OpenAI, adapters: dict[str, Path]
) -> None:
    rows = chart_rows()
    models = [BUILTIN, "first", "second"]
    tasks = [(rows[number % len(rows)], models[number % 3]) for number in range(NUM_REQUESTS)]
    engine: Any = build_engine(engine="transformers", model_id=BUILTIN, dtype="float32")
    for name, path in adapters.items():
        engine.load_adapter(name, str(path))
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}
        for row in rows
    ]
    expected = {
        model: engine.generate(
            [
                GenerationRequest(
                    request_id="x", messages=[message], images=[row["image"]], max_new_tokens=32,
                    adapter=None if model == BUILTIN else model,
                )
                for row, message in zip(rows, messages, strict=True)
            ]
        )
        for model in models
    }  # fmt: skip
    num_done = 0

    def answer(task: tuple[dict[str, Any], str]) -> str:
        nonlocal num_done
        text = ask(client, *task)
        num_done += 1
        return text

    (victim, _) = replica_processes()
    with ThreadPoolExecutor(32) as pool:
        answers = pool.map(answer, tasks)
        wait_for(lambda: num_done >= NUM_REQUESTS // 5)
        victim.kill()
        found = list(answers)
    assert len(found) == NUM_REQUESTS
    for number, ((_, model), text) in enumerate(zip(tasks, found, strict=True)):
        assert text == expected[model][number % len(rows)].text, number
    assert len({expected[model][0].text for model in models}) > 1
    wait_for(lambda: num_running() == 2)
    assert victim.pid not in [process.pid for process in replica_processes()]
