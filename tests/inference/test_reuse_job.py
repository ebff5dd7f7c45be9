"""Runs that ask a server: what they ask it, and what they have from one another."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from benchmarks.common.faulty_server import MODEL, Faults, FaultyServer
from helpers.processes import descendants, is_alive, parquet_rows, run, start, wait_until
from helpers.rows import make_image
from vlmray.benchmark.job import run_benchmark
from vlmray.benchmark.plan import plan_benchmark
from vlmray.cluster import ReplicaPlan
from vlmray.config import BenchmarkConfig, InferConfig
from vlmray.inference.job import describe, run_inference
from vlmray.inference.plan import plan_inference
from vlmray.inference.report import format_table
from vlmray.inference.reuse.folder import Answer
from vlmray.inference.reuse.keeping import start_answers
from vlmray.inference.summary import Summary

IMAGES = {"a.png": 40, "copy_of_a.png": 40, "b.png": 200}
QUESTIONS = ("Why?", "Who?")
NUM_ROWS, NUM_DIFFERENT = 12, 4
NUM_CHARTS = 120


@pytest.fixture
def asked(tmp_path: Path) -> str:
    """A file of rows about three images, two of which are the same, each row twice."""
    for name, number in IMAGES.items():
        (tmp_path / name).write_bytes(make_image(number))
    rows = [{"image": name, "question": text, "answer": "x"} for name in IMAGES for text in QUESTIONS] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "rows.jsonl")


def config(output_dir: Path, url: str, **options: Any) -> InferConfig:
    given: dict[str, Any] = {
        "engine": "openai", "endpoint": url, "model_id": MODEL, "sample_slices": "[:]",
        "output_dir": str(output_dir), **options,
    }  # fmt: skip
    return InferConfig(**given)


def infer(output_dir: Path, server: FaultyServer, **options: Any) -> tuple[int, Summary]:
    """Run; return how often the server was asked, and the run in numbers."""
    before = len(server.seen.bodies)
    summary = run_inference(plan_inference(config(output_dir, server.url, **options)))
    assert (summary.num_rows, summary.num_failed) == (NUM_ROWS, 0)
    return len(server.seen.bodies) - before, summary


@pytest.mark.usefixtures("two_cpus")
def test_rows_that_ask_the_same_are_asked_once_and_the_figures_say_so(asked: str, tmp_path: Path) -> None:
    with FaultyServer(Faults()).running() as server:
        num_asked, summary = infer(tmp_path / "out", server, dataset_name=asked)
    assert num_asked == NUM_DIFFERENT
    assert set(server.seen.answered.values()) == {1}
    rows = parquet_rows(tmp_path / "out").values()
    texts = [row["prediction"] for row in sorted(rows, key=lambda row: row["row_index"])]
    assert texts[:2] == texts[2:4]  # of an image and its copy
    assert texts[:6] == texts[6:]
    assert len(set(texts)) == NUM_DIFFERENT
    assert (summary.num_identical, summary.num_from_cache) == (NUM_ROWS - NUM_DIFFERENT, 0)
    line = "8 answers taken over: 8 from rows that ask the same; rates and cost count them"
    assert line in format_table(summary)
    assert "8 from rows that ask the same; rates and cost" in (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["summary"]["num_identical"] == 8


@pytest.mark.usefixtures("two_cpus")
def test_a_run_asks_nothing_that_an_earlier_one_has_in_the_cache(
    asked: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    given = {"dataset_name": asked, "answer_cache": str(cache)}
    with FaultyServer(Faults()).running() as server:
        planned = plan_inference(config(tmp_path / "dry", server.url, **given, dry_run=True))
        assert ("answer cache", str(cache)) in describe(planned)
        assert infer(tmp_path / "first", server, **given)[0] == NUM_DIFFERENT
        num_asked, summary = infer(tmp_path / "second", server, **given, batch_size=3, metric="anls")
        assert (num_asked, summary.num_identical, summary.num_from_cache) == (0, 0, NUM_ROWS)
        assert summary.usage is not None
        assert "12 answers taken over: 12 from the answer cache" in format_table(summary)
        first, second = (parquet_rows(tmp_path / name) for name in ("first", "second"))
        for row in (*first.values(), *second.values()):
            del row["metric"], row["score"]
        assert first == second
        for changed in ({"prompt_template": "{question}!"}, {"max_pixels": 9999}):
            assert infer(tmp_path / f"{changed}", server, **given, **changed)[0] == NUM_DIFFERENT
        for path in cache.glob("*/part-*"):
            path.write_bytes(path.read_bytes()[:99])
        assert infer(tmp_path / "damaged", server, **given)[0] == NUM_DIFFERENT
        assert f"--answer_cache: {cache}/" in caplog.text
        assert "is damaged" in caplog.text


@pytest.mark.usefixtures("two_cpus")
def test_images_that_the_server_fetches_are_told_apart_by_their_urls(tmp_path: Path) -> None:
    rows = [{"image": f"http://127.0.0.1:9/{n % 4}.png", "question": "?", "answer": "x"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"dataset_name": str(tmp_path / "rows.jsonl"), "image_transport": "url",
             "answer_cache": str(tmp_path / "cache")}  # fmt: skip
    with FaultyServer(Faults()).running() as server:
        assert [infer(tmp_path / name, server, **given)[0] for name in "ab"] == [4, 0]


@pytest.mark.usefixtures("two_cpus")
def test_replicas_have_answers_from_one_another_and_from_the_cache_once_their_keeper_was_lost(
    tmp_path: Path,
) -> None:
    plan = ReplicaPlan(min_replicas=2, max_replicas=2, num_gpus=0, num_cpus=0, num_threads=None)
    answer = Answer("", "fine", 7, 1, None, None, None, "stop")
    for cache, left in ((None, 0), (str(tmp_path / "cache"), 1)):
        given = {"dataset_name": "charts?num_rows=4", "answer_cache": cache}
        planned = plan_inference(config(tmp_path / "out", "http://127.0.0.1:9", **given))
        assert start_answers(planned, plan, 1) is None or cache
        shared = start_answers(planned, plan, 2)
        assert shared is not None
        shared.keep({b"k" * 32: answer})
        assert shared.find([b"k" * 32, b"l" * 32])[b"k" * 32].answer == answer
        ray.kill(shared.actor, no_restart=False)
        wait_until(lambda shared=shared, left=left: len(shared.find([b"k" * 32])) == left)
        assert shared.problems() is None


def test_what_a_killed_run_has_left_is_not_asked_again_whatever_the_folder(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    charts = f"charts?kind=bar&style=plain&num_rows={NUM_CHARTS}&seed=5"
    options = ["--model_id", MODEL, "--dataset_name", charts, "--sample_slices", "[:]",
               "--batch_size", 4, "--answer_cache", cache, "--max_in_flight", 8]  # fmt: skip
    with FaultyServer(Faults(latency_s=0.1)).running() as server:
        options += ["--endpoint", server.url]
        job = start(*options, "--output_dir", tmp_path / "killed")
        wait_until(lambda: len(_parts(cache)) >= 2 or job.poll() is not None)
        workers = [each for title in ("_Replica", "Answers") for each in descendants(title, job.pid)]
        assert len(workers) >= 2
        job.send_signal(signal.SIGKILL)
        job.communicate()
        wait_until(lambda: not any(map(is_alive, workers)))
        num_kept = sum(pq.read_metadata(part).num_rows for part in _parts(cache))
        assert 0 < num_kept < NUM_CHARTS
        before = len(server.seen.bodies)
        done = run(*options, "--output_dir", tmp_path / "other")
        assert done.returncode == 0, done.stderr
        assert f"{num_kept} from the answer cache" in done.stdout
        assert len(server.seen.bodies) - before == NUM_CHARTS - num_kept
    rows = parquet_rows(tmp_path / "other")
    assert len(rows) == NUM_CHARTS
    assert all(row["error"] is None for row in rows.values())


def _parts(cache: Path) -> list[Path]:
    return list(cache.glob("*/part-*.parquet"))


@pytest.mark.usefixtures("two_cpus")
def test_a_benchmark_asks_once_and_measures_speed_as_if_nothing_was_known(
    asked: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultyServer(Faults()).running() as server:

        def compare(name: str, **options: Any) -> tuple[int, dict[tuple[str, str], str]]:
            given = {"models": f"base={MODEL},same={MODEL}", "dataset_name": asked, "speed_samples": 0,
                     "engine": "openai", "endpoint": server.url, **options}  # fmt: skip
            before = len(server.seen.bodies)
            run_benchmark(plan_benchmark(BenchmarkConfig(output_dir=str(tmp_path / name), **given)))
            rows = pq.read_table(tmp_path / name / "predictions.parquet").to_pylist()
            found = {(row["model"], row["sample_id"]): row["prediction"] for row in rows}
            return len(server.seen.bodies) - before, found

        cached = {"answer_cache": str(tmp_path / "cache")}
        caplog.set_level("INFO")
        num_asked, plain = compare("plain")
        assert (num_asked, len(plain)) == (2 * NUM_DIFFERENT, 2 * NUM_ROWS)
        assert "same: 8 answers were taken over from samples that ask the same, 0 from" in caplog.text
        assert compare("first", **cached) == (NUM_DIFFERENT, plain)
        assert "same: 0 answers were taken over from samples that ask the same, 12 from" in caplog.text
        assert compare("second", **cached) == (0, plain)
        num_asked, found = compare("third", **cached, speed_samples=6, concurrency="2")
        assert found == plain
        assert num_asked >= 2 * 6
