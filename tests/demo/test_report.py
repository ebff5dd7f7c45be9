"""The demo's page tells what was compared, before and after, with the benchmark's figures."""

from __future__ import annotations

import pytest

from vlmray.benchmark.samples import SampleFacts
from vlmray.benchmark.scoreboard import score_models
from vlmray.benchmark.verdicts import Results
from vlmray.config import DemoConfig
from vlmray.demo.report import DemoReport, format_demo, render_demo_html
from vlmray.finetune.results import TrainingReport
from vlmray.reports.gallery import GalleryItem
from vlmray.reports.text import TERMINAL_WIDTH


@pytest.fixture(scope="module")
def report() -> DemoReport:
    """Of 20 charts, one question of naming about each is answered right after training alone."""
    samples = [
        SampleFacts(sample_id=f"{family}-{i}", question="?", answers=("4",), family=family, image=f"{i}")
        for i in range(20) for family in ("count", "naming")
    ]  # fmt: skip
    right = {sample.sample_id: {"prediction": "4", "error": None} for sample in samples}
    wrong = {name: {"prediction": "5", "error": None} for name in right if name.startswith("naming")}
    rows = {"base": right | wrong, "tuned": right}
    said = (("base", "<b>then</b>"),)
    card = GalleryItem(sample_id="naming-0", question="Which?", prediction="now", score=1.0, beside=said)
    results = Results(
        title="", models={"base": "builtin", "tuned": "builtin + adapter"},
        board=score_models(samples, rows, ["exact_match"], num_resamples=999), against_baseline={}, speed=(),
        price_per_hour=None, errors={}, num_samples=40, elapsed_s=1.0,
        galleries={"fixed": (20, [card]), "broken": (0, [])},
    )  # fmt: skip
    training = TrainingReport(
        title="", history=[{"step": 0, "eval_loss": 2.0}, {"step": 5, "loss": 1.0}], metric=None,
        num_steps=5, num_samples=40, num_failed=0, samples_per_s=8.0, elapsed_s=5.0, num_trainable=100,
        num_parameters=1000,
    )  # fmt: skip
    return DemoReport(config=DemoConfig(), training=training, results=results, elapsed_s=6.0)


def test_the_closing_lines_fit_a_terminal_and_end_with_the_claim(report: DemoReport) -> None:
    lines = format_demo(report).splitlines()
    assert max(map(len, lines)) <= TERMINAL_WIDTH
    claim = " ".join(lines[lines.index("") + 1 :])
    assert claim.startswith(
        "tuned is better than base on naming: +100.0 points of exact_match, 95 % interval "
    )
    assert "(20 samples, 20 images)" in claim


def test_the_page_shows_both_answers_and_what_was_compared(report: DemoReport) -> None:
    html = render_demo_html(report)
    assert "exact_match on naming, from 0.0 % without the adapter" in html
    assert ">100.0 %</p>" in html
    assert "tuned is better than base on naming" in html
    assert "each of 20 charts that training did not see" in html
    assert "now" in html
    assert "<dt>base</dt>" in html
    assert "&lt;b&gt;then&lt;/b&gt;" in html
    assert "<b>then" not in html
    assert "Broken" not in html  # nothing is
    for folder in ("lora", "comparison"):
        assert f'href="{folder}/report.html"' in html
