"""A judge that grades answers: its file, what it says, and a server that answers it badly or not at all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.faulty_server import MODEL, Faults, FaultyServer
from vlmray.benchmark.job import run_benchmark
from vlmray.benchmark.judge.report import ITSELF
from vlmray.benchmark.judge.settings import JudgeConfig, read_judge
from vlmray.benchmark.plan import BenchmarkError, plan_benchmark
from vlmray.benchmark.report import format_results
from vlmray.benchmark.verdicts import Results
from vlmray.config import BenchmarkConfig
from vlmray.errors import OptionError

pytestmark = pytest.mark.usefixtures("two_cpus")

_ASKED = re.compile(r"Reference: (.*)\nAnswer to be graded: (.*)\n")


def grade(text: str) -> str:
    """Grade as exact match does, with reasons before it."""
    found = _ASKED.search(json.loads(text)[-1])
    assert found is not None
    is_right = found[2].lower() in found[1].lower().split(" | ")
    return f"It says {found[2]}.\n\n**Grade: {'Correct' if is_right else 'wrong'}.**"


def waver(text: str) -> str:
    """Say something else of what was answered no."""
    return "This is not correct" if "graded: no" in json.loads(text)[-1] else grade(text)


def run(folder: Path, url: str, *, judge: dict[str, Any] | None = None, **options: Any) -> Results:
    return run_benchmark(plan_benchmark(config(folder, url, judge=judge, **options)))


def config(folder: Path, url: str, *, judge: dict[str, Any] | None = None, **options: Any) -> BenchmarkConfig:
    file = folder.parent / "judge.json"
    about = {"endpoint": url, "model_id": MODEL, "endpoint_timeout_s": 2, **(judge or {})}
    file.write_text(json.dumps(about))
    options = {
        "models": "yes=fake?answer=yes,no=fake?answer=no", "engine": "fake", "offline": True,
        "dataset_name": "charts?num_rows=24&seed=92&questions_per_image=4", "speed_samples": 0,
        "metrics": "exact_match", "judge": str(file), "output_dir": str(folder),
    } | options  # fmt: skip
    return BenchmarkConfig(**options)


def num_asked(server: FaultyServer) -> int:
    return sum(server.seen.answered.values())


def test_a_judge_is_asked_once_for_each_answer_whatever_befalls_its_server(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    faults = Faults(refuse=0.1, unavailable=0.05, drop=0.1, latency_s=0.01, retry_after_s=0.05)
    with FaultyServer(faults, grade).running() as server:
        results = run(folder, server.url, judge={"num_twice": 12})
        asked = num_asked(server)
        again = run(folder, server.url, judge={"num_twice": 12})
        assert num_asked(server) == asked
        turned = [text for text in server.seen.answered if "wrong, partly or correct" in text]
    assert results.board is not None
    assert results.board.metrics == ("exact_match", "judge")
    for model in ("yes", "no"):
        assert results.board.answers[model, "judge"] == results.board.answers[model, "exact_match"]
    assert results.to_json()["judge"] == again.to_json()["judge"]
    agreement = results.to_json()["judge"]["agreement"]
    assert {name: share["mean"] for name, share in agreement.items()} == {ITSELF: 1.0, "exact_match": 1.0}
    assert agreement[ITSELF]["num_samples"] == 12
    assert 0 < len(turned) <= 12
    assert "Whom the judge agrees with" in (folder / "report.html").read_text()


def test_answers_without_a_grade_are_left_out_and_asked_again(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with FaultyServer(Faults(latency_s=0.0), waver).running() as server:
        results = run(folder, server.url, judge={"num_twice": 0})
        num_first = num_asked(server)
        with pytest.raises(
            BenchmarkError, match=r"24 of 48 answers have no grade .*, so nothing can be compared"
        ):
            run(folder, server.url, judge={"num_twice": 0}, metrics="judge,exact_match")
    assert results.board is not None
    assert results.board.metrics == ("exact_match",)
    judge = results.to_json()["judge"]
    assert (judge["num_graded"], judge["num_ungraded"]) == (24, 24)
    cause = "the judge's last line is none of correct, partly, wrong"
    assert judge["causes"] == [{"cause": cause, "num_answers": 24}]
    assert cause in " ".join(format_results(results).split())
    with FaultyServer(Faults(latency_s=0.0), grade).running() as server:  # elsewhere, and it has learned
        results = run(folder, server.url, judge={"num_twice": 0})
        assert num_asked(server) < num_first
    assert results.to_json()["judge"]["num_ungraded"] == 0


def test_a_judge_that_leaves_in_the_middle(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with FaultyServer(Faults(latency_s=0.02), grade).running() as server:
        benchmark = plan_benchmark(config(folder, server.url, judge={"max_in_flight": 1}))
        server.leave_after(10)
        results = run_benchmark(benchmark)
    judge = results.to_json()["judge"]
    kept = (folder / "judgements.jsonl").read_text().splitlines()
    assert len(kept) == 10
    assert judge["num_graded"] > 0
    assert "the judge does not answer" in judge["causes"][0]["cause"]
    with (folder / "judgements.jsonl").open("a") as file:
        file.write('{"key": "cut o')  # killed while it wrote
    with FaultyServer(Faults(latency_s=0.0), grade).running() as server:
        results = run(folder, server.url)
        assert num_asked(server) + 10 == len((folder / "judgements.jsonl").read_text().splitlines()) - 1
    assert results.to_json()["judge"]["num_ungraded"] == 0


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"endpoint": "localhost:8000"}, "endpoint must be the URL of a server"),
        ({"endpoint": "http://user:secret@host"}, "endpoint holds a password"),
        ({"scale": {"good": 1}}, "expected two grades or more"),
        ({"scale": {"good": 1, "bad": 2}}, "expected two grades or more, each worth 0 to 1"),
        ({"scale": {"good": 1, "bad": True}}, "expected two grades or more, each worth 0 to 1"),
        ({"scale": {"good": 1, "fine": 1}}, "all worth the same"),
        ({"scale": {"good": 1, "Good": 0}}, "has a grade twice"),
        ({"scale": {"good!": 1, "bad": 0}}, "expected grades of letters and digits"),
        ({"prompt_template": "{question} {answers} {scale}"}, "does not name {prediction}"),
        ({"prompt_template": "{question} {answers} {scale} {prediction} {image}"}, "names {image}"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"num_twice": True}, "num_twice must be a whole number, got True"),
        ({"with_images": "often"}, "with_images must be true or false, got 'often'"),
        ({"max_in_flight": 0}, "max_in_flight"),
        ({"temprature": 1}, "unknown option 'temprature'"),
        ({"model_id": None}, "model_id needs a value"),
    ],
)
def test_a_file_that_is_refused(tmp_path: Path, about: dict[str, Any], message: str) -> None:
    file = tmp_path / "judge.json"
    file.write_text(json.dumps({"endpoint": "http://host:8000", "model_id": "m", **about}))
    with pytest.raises(OptionError, match=re.escape(message)):
        read_judge(str(file))


def test_a_judge_that_is_not_there_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with FaultyServer(Faults(latency_s=0.0), grade).running() as server:
        about = config(tmp_path / "out", server.url, judge={"model_id": "other"})
        with pytest.raises(OptionError, match=r"--judge: .* does not serve 'other'; it serves faulty"):
            plan_benchmark(about)
    with pytest.raises(OptionError, match=r"--judge: .* does not list its models"):
        plan_benchmark(config(tmp_path / "out", server.url))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("correct", "correct"),
        ("It is fine.\n\n**Grade: Partly right**\n", "partly right"),
        ("Grade - correct.", None),
        ("correct\nI hope this helps!", None),
        ("not correct", None),
        ("incorrect", None),
        ("correct or wrong", None),
        ("", None),
    ],
)
def test_the_last_line_is_the_grade_and_nothing_else(text: str, expected: str | None) -> None:
    judge = JudgeConfig(endpoint="", model_id="", scale={"correct": 1, "partly right": 0.5, "wrong": 0})
    assert judge.read_grade(text) == expected


def test_what_people_wrote_stays_what_it_is() -> None:
    judge = JudgeConfig(endpoint="", model_id="", prompt_template="{question}/{answers}/{prediction}/{scale}")
    worded = judge.word("{scale}?", ["a", "b"], "{question}", turned=True)
    assert worded == "{scale}?/a | b/{question}/wrong, partly or correct"
