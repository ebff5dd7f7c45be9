"""The benchmark on a real Ray cluster: through Serve, offline, resumed, against a server, and refused."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from helpers.paths import ROOT
from helpers.processes import descendants, free_port, wait_until
from vlmray.benchmark.clients import Clients, Timed
from vlmray.benchmark.job import run_benchmark
from vlmray.benchmark.plan import plan_benchmark
from vlmray.benchmark.verdicts import Results
from vlmray.builtin.models import BUILTIN, BUILTIN_FOLDER
from vlmray.cli import run_job
from vlmray.config import BenchmarkConfig, ServeConfig
from vlmray.engines.fake import build_tiny_random_adapter
from vlmray.engines.openai.client import EndpointError
from vlmray.schema import GenerationRequest
from vlmray.serving.server import Server, serve_app

CHARTS = "charts?num_rows=48&kind=bar&style=plain&seed=92&questions_per_image=4"
FAKE = "fake?answer=yes"
pytestmark = pytest.mark.usefixtures("two_cpus")


def config(output_dir: Path, **options: Any) -> BenchmarkConfig:
    options = {
        "models": f"base={FAKE}",
        "engine": "openai" if "endpoint" in options else "fake",
        "dataset_name": CHARTS,
        "speed_samples": 0,
    } | options
    return BenchmarkConfig(output_dir=str(output_dir), **options)


def run(output_dir: Path, **options: Any) -> Results:
    return run_benchmark(plan_benchmark(config(output_dir, **options)))


def predictions(folder: Path) -> dict[tuple[str, str], str]:
    rows = pq.read_table(folder / "predictions.parquet").to_pylist()
    return {(row["model"], row["sample_id"]): row["prediction"] for row in rows}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that spoils the built-in model."""
    return build_tiny_random_adapter(tmp_path_factory.mktemp("adapter") / "spoilt", BUILTIN_FOLDER, seed=1)


@pytest.fixture(scope="module")
def compared(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """The built-in model against a spoilt one, through a server."""
    folder = tmp_path_factory.mktemp("compared")
    options = models_with(adapter) | {"speed_samples": 8, "concurrency": "1,4", "price_per_hour": 2.0}
    return folder, run(folder, **options)


def models_with(adapter: Path) -> dict[str, Any]:
    return {
        "models": f"base={BUILTIN},spoilt={BUILTIN}+{adapter}", "engine": "transformers", "dtype": "float32",
        "metrics": "exact_match,relaxed_accuracy,anls,token_f1,rouge,bleu", "max_new_tokens": 24,
    }  # fmt: skip


def test_a_spoilt_model_is_called_worse(compared: tuple[Path, Results]) -> None:
    folder, results = compared
    found = json.loads((folder / "results.json").read_text())
    assert found["verdicts"][0].startswith("spoilt is worse than base: -")
    total = next(entry for entry in found["differences"] if entry["kind"] == "all")
    assert total["verdict"] == "worse"
    assert total["difference"]["high"] < 0
    assert found["dataset"]["num_samples"] == 48
    assert found["bleu"]["base"]["signature"]
    assert len(predictions(folder)) == 96
    assert results.num_answered == 96
    page = (folder / "report.html").read_text()
    assert "<title>base, spoilt on Built-in charts, 48 rows</title>" in page
    assert "spoilt is worse than base" in page
    assert '<th scope="row">models</th>' in page
    assert '<th scope="row">metric</th>' not in page  # it has no such option: --metrics says it
    assert "| exact\\_match |" in (folder / "report.md").read_text()


def test_speed_is_measured_by_model_and_load(compared: tuple[Path, Results]) -> None:
    _, results = compared
    assert [(point.model, point.load) for point in results.speed] == [
        ("base", 1), ("spoilt", 1), ("base", 4), ("spoilt", 4),
    ]  # fmt: skip
    for point in results.speed:
        assert (point.num_requests, point.num_failed) == (8, 0)
        assert point.requests_per_s > 0
        assert point.tokens_per_s > point.requests_per_s
        for percentiles in (point.ttft_ms, point.latency_ms):
            assert percentiles is not None
            assert sorted(percentiles) == list(percentiles)
        assert point.ttft_ms is not None
        assert point.latency_ms is not None
        assert point.ttft_ms[0] <= point.latency_ms[0]


def test_offline_gives_the_same_answers(
    compared: tuple[Path, Results], adapter: Path, tmp_path: Path
) -> None:
    folder, _ = compared
    results = run(tmp_path, offline=True, **models_with(adapter))
    assert predictions(tmp_path) == predictions(folder)
    assert results.speed == ()


def test_a_finished_run_plans_the_next(
    compared: tuple[Path, Results], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(folder: Path) -> object:
        options = {**models_with(adapter), "dataset_name": CHARTS, "output_dir": folder}
        with pytest.raises(SystemExit) as stopped:
            run_job("benchmark", ["--plan=difference=5", *(f"--{n}={v}" for n, v in options.items())])
        return stopped.value.code

    before = {path: path.stat().st_mtime_ns for path in compared[0].glob("*.*")}
    assert plan(compared[0]) == 0
    assert "spoilt, base" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in compared[0].glob("*.*")} == before
    assert plan(tmp_path) == 2
    assert "--plan needs answers, and" in capsys.readouterr().err


def test_the_same_command_asks_nothing_again(compared: tuple[Path, Results], adapter: Path) -> None:
    folder, results = compared
    before = json.loads((folder / "results.json").read_text())
    started = time.monotonic()
    again = run(folder, **models_with(adapter), speed_samples=8, concurrency="1,4", price_per_hour=2.0)
    assert time.monotonic() - started < 15  # no server was started
    after = json.loads((folder / "results.json").read_text())
    for found in (before, after):
        del found["elapsed_s"]
    assert after == before
    assert again.speed == results.speed


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    log, folder = tmp_path / "log", tmp_path / "out"
    models = f"base=fake?latency_s=0.05&answer=yes,other=fake?latency_s=0.05&log={log}"
    options = ["--models", models, "--engine", "fake", "--dataset_name", "charts?num_rows=160&seed=3"]
    options += ["--speed_samples", "0", "--output_dir", str(folder)]
    command = [sys.executable, str(ROOT / "jobs" / "benchmark.py"), *options]
    env = {**os.environ, "RAY_ADDRESS": ""}
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_until(lambda: len(list((folder / "other" / "predictions").glob("part-*"))) >= 1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = sum(
        pq.read_metadata(part).num_rows for part in (folder / "other" / "predictions").glob("part-*.parquet")
    )
    assert 0 < kept < 160
    num_asked = len(log.read_text().splitlines())
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(predictions(folder)) == 320
    # What was written is not asked again; up to 8 requests in flight were still answered, for nobody.
    assert 160 - kept <= len(log.read_text().splitlines()) - num_asked <= 160 - kept + 8
    whole = tmp_path / "whole"
    run(whole, models=models, dataset_name="charts?num_rows=160&seed=3")
    assert predictions(whole) == predictions(folder)
    names = ("verdicts", "scores", "differences", "bleu", "dataset", "prompt")
    reports = [json.loads((each / "results.json").read_text()) for each in (folder, whole)]
    assert [reports[0][name] for name in names] == [reports[1][name] for name in names]


def test_a_model_may_be_compared_with_itself(tmp_path: Path) -> None:
    options = {"sample_slices": "[:12]", "speed_samples": 2, "concurrency": "1"}
    results = run(tmp_path, models=f"base={FAKE},same={FAKE}", **options)
    found = predictions(tmp_path)
    assert len(found) == 24
    assert {text for (model, _), text in found.items() if model == "same"} == {"yes"}
    assert [(point.model, point.num_failed) for point in results.speed] == [("base", 0), ("same", 0)]


def test_a_killed_replica_changes_no_answer(tmp_path: Path) -> None:
    models = "base=fake?latency_s=0.02,other=fake?latency_s=0.02&answer=no"
    options = {"models": models, "dataset_name": "charts?num_rows=200&seed=4", "num_replicas": "2"}
    with ThreadPoolExecutor(1) as pool:
        results = pool.submit(run, tmp_path / "killed", **options)
        wait_until(lambda: list((tmp_path / "killed" / "base" / "predictions").glob("part-*")))
        descendants("ray::ServeReplica:vlmray:model")[0].kill()
        assert results.result().num_answered == 400
    run(tmp_path / "whole", **options, offline=True)
    assert predictions(tmp_path / "killed") == predictions(tmp_path / "whole")


def test_an_earlier_run_is_a_baseline_for_the_same_samples(tmp_path: Path) -> None:
    run(tmp_path / "then", models="base=fake?answer=no")
    path = str(tmp_path / "then" / "results.json")
    results = run(tmp_path / "now", models=f"base={FAKE},new=fake?answer=no", baseline=path)
    assert list(results.against_baseline) == ["base"]
    for options, message in (
        ({"sample_slices": "[:8]"}, "its num_samples was 48 and is 8 now"),
        ({"prompt_template": "{question}!"}, "its prompt_template was '{question}' and is '{question}!' now"),
        ({"baseline": str(tmp_path / "gone.json")}, "pass the results.json of a finished run"),
    ):
        with pytest.raises(ValueError, match="--baseline") as refused:
            plan_benchmark(config(tmp_path / "other", **{"baseline": path, **options}))
        assert message in str(refused.value)


def test_failed_rows_are_wrong_and_named(tmp_path: Path) -> None:
    results = run(tmp_path, models="base=fake?answer=yes&error_every=4", offline=True)
    assert sum(group.num_rows for group in results.errors["base"]) == 12
    assert results.num_answered == 36
    assert "Failed rows of base by cause" in (tmp_path / "report.html").read_text()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve_app(ServeConfig(model_id="fake?latency_s=0.01", engine="fake", port=free_port())) as running:
        yield running


def test_any_server_can_be_asked(server: Server, tmp_path: Path) -> None:
    results = run(
        tmp_path,
        endpoint=server.url,
        models="mine=fake?latency_s=0.01",
        speed_samples=6,
        request_rate="20,40",
    )
    assert results.num_answered == 48
    assert [point.load for point in results.speed] == [20, 40]
    assert results.speed[0].kind == "requests/s offered"
    with pytest.raises(ValueError, match="does not serve 'other'; it serves fake"):
        run(tmp_path / "other", endpoint=server.url, models="mine=other")


def test_speed_alone_needs_no_answers(server: Server, tmp_path: Path) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"question": f"Number {i}?"}) + "\n" for i in range(8)))
    options = {
        "endpoint": f"{server.url}/v1",
        "models": "mine=fake?latency_s=0.01",
        "dataset_name": str(data),
    }
    with pytest.raises(ValueError, match=r"has no answers to compare with .* pass --metrics none"):
        plan_benchmark(config(tmp_path / "scored", **options))
    results = run(tmp_path / "speed", **options, metrics="none", speed_samples=8, concurrency="2")
    assert results.board is None
    assert results.speed[0].num_requests == 8
    assert not (tmp_path / "speed" / "predictions.parquet").exists()
    assert "requests/s" in (tmp_path / "speed" / "report.html").read_text()


def test_requests_are_sent_when_they_are_due_whether_answered_or_not(server: Server) -> None:
    """At 100 a second and 10 ms each one after the other, more and more are in flight."""
    message = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    requests = [GenerationRequest(request_id=str(i), messages=[message]) for i in range(100)]

    async def ask() -> list[Timed]:
        async with Clients(server.url) as clients:
            found = clients.ask_at_rate("fake?latency_s=0.01", requests, 100.0, seed=2)
            return [timed async for timed in found]

    timed = sorted(asyncio.run(ask()), key=lambda answer: answer.index)
    assert [answer.index for answer in timed] == list(range(100))
    sent = [answer.started_s for answer in timed]
    assert sent == sorted(sent)
    assert 0.6 < sent[-1] - sent[0] < 2.5
    assert all(answer.completion.text.startswith("fake") and answer.ttft_s for answer in timed)


def test_a_server_that_is_not_there_is_named() -> None:
    async def ask() -> None:
        async with Clients("http://127.0.0.1:9") as clients:
            await clients.check_served([FAKE])

    with pytest.raises(EndpointError, match=r"http://127\.0\.0\.1:9 does not list its models"):
        asyncio.run(ask())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "--models is required"),
        (
            f"--models base={FAKE} --metrics acuracy",
            "--metrics: 'acuracy' is unknown; known: relaxed_accuracy",
        ),
        (f"--models base={FAKE} --metrics bleu", "the first one decides"),
        (f"--models base={FAKE},base=fake", "--models: the name 'base' is given twice"),
        ("--models fake", "--models has 'fake'; expected name=model"),
        ("--models a/b=fake", "names of letters"),
        (f"--models base={FAKE} --engine openai --endpoint http://127.0.0.1:9", "does not list its models"),
        (f"--models base={FAKE}+x --endpoint http://127.0.0.1:9", "a server's models have one name each"),
        (f"--models base={FAKE} --concurrency 0", "--concurrency must be numbers above 0"),
        (f"--models base={FAKE} --request_rate fast", "--request_rate must be numbers above 0"),
        (f"--models base={FAKE} --offline --endpoint http://127.0.0.1:9", "--offline asks no server"),
        (f"--models base={FAKE} --metrics none --speed_samples 0", "leaves nothing to do"),
        (f"--models base={FAKE} --model_id builtin", "unknown option --model_id; did you mean --models?"),
        (f"--models base={FAKE} --sample_slices [5000:]", "the split has"),
        (f"--models base={FAKE} --output_dir s3://bucket/x", "must be a local folder"),
        ("--engine transformers --models base=./nowhere", "./nowhere"),
        (f"--engine transformers --models base={BUILTIN},tuned={BUILTIN}+./nowhere", "./nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    options: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = f"--engine fake --dataset_name {shlex.quote(CHARTS)} --output_dir {tmp_path} {options}"
    with pytest.raises(SystemExit) as stopped:
        run_job("benchmark", shlex.split(command))
    stderr = capsys.readouterr().err
    assert stopped.value.code == 2, stderr
    assert message in stderr
    assert "Traceback" not in stderr


def test_an_adapter_of_another_base_is_refused(tiny_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was made for"):
        plan_benchmark(
            config(tmp_path, models=f"base={BUILTIN},alien={BUILTIN}+{tiny_adapter}", engine="transformers")
        )
