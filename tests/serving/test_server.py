"""The server on a real Ray cluster: right answers under load, after a killed replica, and to the end."""

from __future__ import annotations

import base64
import contextlib
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import openai
import psutil
import pyarrow.parquet as pq
import pytest
import requests

from helpers.paths import ROOT
from helpers.processes import descendants, free_port, http_server, huge_png, wait_until
from helpers.servers import figures, in_progress, make_client, num_running
from vlmray.builtin.charts import ChartsSource
from vlmray.builtin.models import BUILTIN, BUILTIN_FOLDER
from vlmray.config import InferConfig, ServeConfig
from vlmray.engines import build_engine
from vlmray.engines.fake import build_tiny_random_adapter
from vlmray.inference.job import run_inference
from vlmray.inference.plan import plan_inference
from vlmray.schema import GenerationRequest
from vlmray.serving.server import APP_NAME, Server, serve_app

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
        model_id=BUILTIN, adapters=",".join(f"{name}={path}" for name, path in adapters.items()),
        port=free_port(), num_replicas="2", dtype="float32", allow_private_image_urls=True, max_new_tokens=32,
    )  # fmt: skip
    with serve_app(config) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return make_client(server)


def chart_rows() -> list[dict[str, Any]]:
    source = ChartsSource(CHARTS, "test")
    return source.read(list(range(len(source))), ["image", "question"])


def question(row: dict[str, Any], url: str = "") -> Any:
    """The messages that ask about a row's image, or about one behind a URL."""
    url = url or f"data:image/png;base64,{base64.b64encode(row['image']).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": row["question"]}]
    return [{"role": "user", "content": parts}]


def ask(client: openai.OpenAI, row: dict[str, Any], model: str = BUILTIN, url: str = "") -> str:
    completion = client.chat.completions.create(model=model, messages=question(row, url))
    return completion.choices[0].message.content or ""


def replica_processes() -> list[psutil.Process]:
    return descendants(f"ServeReplica:{APP_NAME}:model")


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
    with http_server(Handler) as files:
        url = f"{files}/chart.png"
        assert ask(client, row, url=url) == expected
        chunks = client.chat.completions.create(model=BUILTIN, messages=question(row, url), stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_the_example_of_the_readme_runs(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chart.png").write_bytes(chart_rows()[0]["image"])
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n([^`]*?OpenAI.*?)```", readme, flags=re.DOTALL)
    exec(compile(code.replace("http://127.0.0.1:8000", server.url), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip().isdigit()


def test_500_requests_are_each_answered_right_though_a_replica_is_killed(
    server: Server, client: openai.OpenAI, adapters: dict[str, Path]
) -> None:
    rows = chart_rows()
    models = [BUILTIN, "first", "second"]
    tasks = [(rows[number % len(rows)], models[number % 3]) for number in range(NUM_REQUESTS)]
    engine: Any = build_engine(engine="transformers", model_id=BUILTIN, dtype="float32")
    for name, path in adapters.items():
        engine.load_adapter(name, str(path))
    names = {model: None if model == BUILTIN else model for model in models}
    expected = {model: [answer_alone(engine, row, names[model]) for row in rows] for model in models}
    num_done = 0

    def answer(task: tuple[dict[str, Any], str]) -> str:
        nonlocal num_done
        text = ask(client, *task)
        num_done += 1
        return text

    (victim, _) = replica_processes()
    with ThreadPoolExecutor(32) as pool:
        answers = pool.map(answer, tasks)
        wait_until(lambda: num_done >= NUM_REQUESTS // 5)
        victim.kill()
        found = list(answers)
    assert len(found) == NUM_REQUESTS
    for number, ((_, model), text) in enumerate(zip(tasks, found, strict=True)):
        assert text == expected[model][number % len(rows)], number
    assert len({tuple(expected[model]) for model in models}) == 3
    wait_until(lambda: num_running() == 2)
    assert victim.pid not in [process.pid for process in replica_processes()]


def test_answers_stay_right_while_many_come_and_leave(
    server: Server, client: openai.OpenAI, inferred: list[str]
) -> None:
    """Leaving in line, in the middle of an answer, or while an adapter's neighbours are answered."""
    rows, chance = chart_rows(), random.Random(0)
    models = [BUILTIN, "first", "second"]

    def visit(number: int) -> str | None:
        row, kind = rows[number % len(rows)], number % 3
        if kind == 0:
            return ask(client, row)
        model = models[number % 2]
        if kind == 1:
            client.chat.completions.create(model=model, messages=question(row), stream=True).close()
        else:
            with contextlib.suppress(openai.APITimeoutError):
                ask(client.with_options(timeout=chance.uniform(0.05, 1)), row, model)
        return None

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(visit, range(360)))
    for number in range(0, 360, 3):
        assert found[number] == inferred[number % len(rows)], number
    wait_until(lambda: in_progress(server) == 0)
    left = 'vlmray_requests_total{model="%s",status="499"}'
    assert sum(figures(server).get(left % model, 0) for model in models) > 60
    assert ask(client, rows[0]) == inferred[0]


def test_floods_and_bombs_leave_the_server_as_it_was(server: Server, client: openai.OpenAI) -> None:
    """Through Serve's own proxy: 100 MB with and without a declared length, and huge or broken images."""

    def private_bytes() -> int:
        actors = [*descendants("ray::ProxyActor"), *descendants("ray::ServeReplica")]
        usage = [process.memory_info() for process in actors]
        return sum(each.rss - each.shared for each in usage)

    def post(body: Any) -> tuple[int, float]:
        started = time.monotonic()
        headers = {"Content-Type": "application/json"}
        with contextlib.suppress(requests.ConnectionError):  # refused before all of it was sent
            url = f"{server.url}/v1/chat/completions"
            return requests.post(url, data=body, headers=headers, timeout=60).status_code, (
                time.monotonic() - started
            )
        return 413, time.monotonic() - started

    def image(data: bytes) -> bytes:
        url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
        return json.dumps({"model": BUILTIN, "messages": [message]}).encode()

    row = chart_rows()[0]
    megabyte = b" " * 2**20
    attacks: list[tuple[Callable[[], Any], int]] = [
        (lambda: megabyte * 100, 413),
        (lambda: (megabyte for _ in range(100)), 413),
        (lambda: image(huge_png(50_000, 50_000)), 400),
        (lambda: image(row["image"][:500]), 400),
        (lambda: image(b"\x00" * 20_000_000), 400),
        (lambda: b"{" * 1_000_000, 400),
    ]
    expected = ask(client, row)
    for make, _ in attacks * 2:  # the first times, code and pools of memory come in
        post(make())
    before = private_bytes()
    for make, status in attacks * 3:
        found, elapsed_s = post(make())
        assert found == status
        assert elapsed_s < 10
        assert ask(client, row) == expected
    assert private_bytes() - before < 256 * 2**20


def test_adapters_come_at_run_time_and_make_room_for_each_other(
    server: Server, adapters: dict[str, Path], tmp_path: Path, tiny_adapter: Path, inferred: list[str]
) -> None:
    """One server at a time fits on two CPUs, so this one follows on that of the module."""
    server.stop()
    rows = chart_rows()[:4]
    config = ServeConfig(
        model_id=BUILTIN, served_model_name="reader", adapter_dir=str(tmp_path), max_adapters=1,
        port=free_port(), dtype="float32", max_new_tokens=32,
    )  # fmt: skip
    with serve_app(config) as changed:
        client = make_client(changed)
        assert [model.id for model in client.models.list()] == ["reader"]
        assert [ask(client, row, "reader") for row in rows] == inferred[:4]
        for name, path in {**adapters, "alien": tiny_adapter}.items():
            shutil.copytree(path, tmp_path / name)
        assert [model.id for model in client.models.list()] == ["reader", "alien", "first", "second"]
        tasks = [(row, name) for _ in range(4) for row in rows for name in ("first", "second", "reader")]
        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(lambda task: ask(client, *task), tasks))
        engine: Any = build_engine(engine="transformers", model_id=BUILTIN, dtype="float32")
        for name, path in adapters.items():
            engine.load_adapter(name, str(path))
        assert found == [answer_alone(engine, row, None if name == "reader" else name) for row, name in tasks]
        with pytest.raises(openai.BadRequestError, match=r"was made for .* and does not fit"):
            ask(client, rows[0], "alien")
        with pytest.raises(openai.BadRequestError, match=r"127\.0\.0\.1 is not a public address"):
            ask(client, rows[0], "reader", url="http://127.0.0.1:9/a.png")


def answer_alone(engine: Any, row: dict[str, Any], adapter: str | None) -> str:
    parts = [{"type": "image"}, {"type": "text", "text": row["question"]}]
    request = GenerationRequest(
        request_id="x", images=[row["image"]], max_new_tokens=32, adapter=adapter,
        messages=[{"role": "user", "content": parts}],
    )  # fmt: skip
    return str(engine.generate([request])[0].text)
