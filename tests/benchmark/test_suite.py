"""Several datasets in one comparison: one verdict, for which more has to be shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmray.benchmark.samples import SampleFacts
from vlmray.benchmark.scoreboard import score_models
from vlmray.benchmark.slices.finding import find_worse
from vlmray.benchmark.suite.datasets import read_datasets
from vlmray.benchmark.suite.report import format_suite, render_suite_html
from vlmray.benchmark.suite.verdict import SuiteResults, find
from vlmray.benchmark.verdicts import Results
from vlmray.cli import run_job
from vlmray.config import BenchmarkConfig
from vlmray.metrics.significance import holm
from vlmray.reports.text import TERMINAL_WIDTH

NUM_SAMPLES = 200


def results(*lost: int, margin: float | None = None, gained: int = 0) -> Results:
    """Answers of a base, which knows half, and of models that lose so many of these and gain others."""
    samples = [
        SampleFacts(sample_id=f"{i}", question="?" * (1 + i % 3), answers=("4",), image=f"{i}")
        for i in range(NUM_SAMPLES)
    ]
    half = NUM_SAMPLES // 2

    def rows(is_right: Any) -> dict[str, Any]:
        return {
            f"{i}": {"prediction": "4" if is_right(i) else "5", "error": None} for i in range(NUM_SAMPLES)
        }

    answers = {"base": rows(lambda i: i < half)}
    for place, number in enumerate(lost):
        answers[f"m{place}"] = rows(lambda i, number=number: number <= i < half + gained)
    board = score_models(samples, answers, ["exact_match"], margin=margin, num_resamples=999)
    return Results(
        title="", models={name: name for name in answers}, board=board, against_baseline={}, speed=(),
        price_per_hour=None, errors={}, num_samples=NUM_SAMPLES, galleries={}, elapsed_s=1.0,
        slices=find_worse(board, samples),
    )  # fmt: skip


def suite(**datasets: Results) -> SuiteResults:
    return SuiteResults(results=datasets, findings=find(datasets), elapsed_s=1.0, options={})


def test_each_dataset_gets_the_verdict_that_is_asked_for() -> None:
    found = suite(
        trained=results(0, gained=40), other=results(1, margin=0.1), spoilt=results(60),
        open=results(10, margin=0.04), same=results(0),
    )  # fmt: skip
    assert {each.dataset: each.verdict for each in found.findings} == {
        "trained": "better", "other": "not worse", "spoilt": "worse", "open": "not shown",
        "same": "no significant change",
    }  # fmt: skip
    assert found.sentences == [
        "m0 is worse than base on spoilt; not shown to be no worse than base by more than the margin on "
        "open; better than base on trained; not worse by more than the margin on other; not shown to differ "
        "on same."
    ]


def test_all_questions_are_corrected_for_each_other() -> None:
    found = suite(one=results(3, 9), two=results(4, 0, margin=0.1))
    alone = [
        each.difference.difference.p_value if each.margin is None else each.margin.test.p_value
        for each in found.findings
    ]
    assert len(alone) == 4
    assert [each.p_value for each in found.findings] == pytest.approx(holm(alone))


def test_what_one_dataset_shows_many_do_not() -> None:
    shown = results(6)
    assert [each.verdict for each in suite(one=shown).findings] == ["worse"]
    many = suite(one=shown, **{f"same{i}": results(0) for i in range(3)})
    assert many.findings[0].verdict == "no significant change"


def test_the_table_fits_a_terminal_and_the_page_links_each_dataset() -> None:
    found = suite(trained=results(0, gained=40), untrained_families=results(1, margin=0.1))
    assert max(map(len, format_suite(found).splitlines())) <= TERMINAL_WIDTH
    page = render_suite_html(found)
    for name in found.results:
        assert f'href="{name}/report.html"' in page
    assert "Where it got worse" not in page
    assert "question up to 1 characters" in render_suite_html(suite(same=results(0), spoilt=results(60)))


def write(tmp_path: Path, *entries: object) -> str:
    path = tmp_path / "datasets.json"
    path.write_text(json.dumps(list(entries)))
    return str(path)


CHARTS = {"name": "charts", "dataset_name": "charts?num_rows=8"}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "names none"),
        ([3], "entry 1 has no dataset_name"),
        ([CHARTS, {"name": "x"}], "entry 2 has no dataset_name"),
        ([CHARTS | {"name": "a/b"}], r"entry 1 has the name 'a/b'; expected letters"),
        ([CHARTS, CHARTS], "the name 'charts' is given twice"),
        ([CHARTS | {"model_id": "x"}], "charts has 'model_id'; expected name and dataset_name"),
        ([CHARTS | {"margin": 200}], "charts: --margin 200 must be points"),
        ([CHARTS | {"margin": "wide"}], "charts: --margin"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, entries: list[object], message: str) -> None:
    config = BenchmarkConfig(models="base=fake", datasets=write(tmp_path, *entries))
    with pytest.raises(ValueError, match=message) as caught:
        read_datasets(config)
    assert str(caught.value).startswith("--datasets")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "holds no JSON list"), ("[1", "is no JSON: .*"), ("[" * 10**5, "is nested too deeply"),
     (" " * 2**21, "has more than 1,048,576 bytes")],
)  # fmt: skip
def test_what_is_no_list_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "datasets.json").write_text(text)
    config = BenchmarkConfig(models="base=fake", datasets=str(tmp_path / "datasets.json"))
    with pytest.raises(ValueError, match=f"--datasets .*json {message}; expected a list"):
        read_datasets(config)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--datasets .*none\.json: .*No such file.*expected a list"):
        read_datasets(BenchmarkConfig(models="base=fake", datasets=str(tmp_path / "none.json")))


def test_what_an_entry_does_not_say_is_said_for_all(tmp_path: Path) -> None:
    file = write(
        tmp_path, CHARTS, {"name": "own", "dataset_name": "charts", "margin": 3, "dataset_split": "train"}
    )
    config = BenchmarkConfig(models="base=fake", datasets=file, margin=2, output_dir="out")
    found = read_datasets(config)
    assert {name: (each.margin, each.dataset_split) for name, each in found.items()} == {
        "charts": (2, "test"), "own": (3, "train"),
    }  # fmt: skip
    assert [each.output_dir for each in found.values()] == ["out/charts", "out/own"]


@pytest.mark.usefixtures("two_cpus")
def test_two_datasets_are_asked_and_the_same_command_asks_nothing_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    file = write(tmp_path, CHARTS, {"name": "more", "dataset_name": "charts?num_rows=6&seed=3", "margin": 50})
    options = {
        "models": f"base=fake?answer=yes&log={log},other=fake?answer=no", "engine": "fake", "offline": "true",
        "datasets": file, "output_dir": str(out),
    }  # fmt: skip

    def run() -> str:
        with pytest.raises(SystemExit) as stopped:
            run_job("benchmark", [f"--{name}={value}" for name, value in options.items()])
        assert stopped.value.code == 0
        return capsys.readouterr().out

    said = run()
    assert "other is not shown to be no worse than base by more than the margin on more;" in said
    written = json.loads((out / "results.json").read_text())
    assert [(each["dataset"], each["margin"] is None) for each in written["findings"]] == [
        ("charts", True), ("more", False),
    ]  # fmt: skip
    for name in ("charts", "more", "."):
        assert (out / name / "report.html").is_file()
    assert len(log.read_text().split()) == 14
    again = run()
    assert len(log.read_text().split()) == 14
    assert again == said
