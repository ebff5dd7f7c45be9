"""The report of a training run says what the trainer logged, at its best and at its worst."""

from __future__ import annotations

import html
import math
import re
from typing import Any

import pytest

from vlmray.finetune import report
from vlmray.finetune.report import format_training_table, render_training_html
from vlmray.finetune.results import Check, TrainingReport
from vlmray.reports.errors import group_errors
from vlmray.reports.gallery import GalleryItem
from vlmray.reports.text import TERMINAL_WIDTH, display_width


def make_history(num_steps: int = 100, every: int = 5, evaluate_every: int = 50) -> list[dict[str, Any]]:
    """Log a falling loss and a rising score, as the trainer does."""
    history: list[dict[str, Any]] = []
    for step in range(0, num_steps + 1, every):
        if step:
            history.append(
                {"step": step, "loss": 2 - step / num_steps, "learning_rate": 2e-4, "grad_norm": 1.0}
            )
        if step % evaluate_every == 0:
            share = step / num_steps
            history.append({"step": step, "eval_loss": 3 - share, "eval_relaxed_accuracy": 0.12 + share / 2})
    return [*history, {"step": num_steps, "train_runtime": 320.0, "train_loss": 1.5, "total_flos": 1e15}]


def make_report(**values: Any) -> TrainingReport:
    defaults: dict[str, Any] = {
        "title": "LoRA on tiny, charts",
        "history": make_history(),
        "metric": "relaxed_accuracy",
        "num_steps": 100,
        "num_samples": 396,
        "num_failed": 4,
        "samples_per_s": 1.237,
        "elapsed_s": 320.4,
        "num_trainable": 18_576_384,
        "num_parameters": 3_773_199_360,
        "num_targets": 252,
        "checks": (
            Check(name="loads afresh", passed=True, detail="252 modules"),
            Check(name="changes the base's logits", passed=True),
        ),
    }
    return TrainingReport(**(defaults | values))


def read_text(built: TrainingReport) -> str:
    """Render a report and take the text off the page."""
    main = render_training_html(built).split("<main>")[1].split("</main>")[0]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", main)).split())


def read_headline(built: TrainingReport) -> tuple[str, str]:
    """Return the one number of the page, and the text beside it."""
    header = render_training_html(built).split('<div class="headline">')[1].split("</div>")[0]
    value, text = header.split("</p>", 1)
    value, text = (" ".join(re.sub(r"<[^>]+>", " ", part).split()) for part in (value, text))
    return value, text


# History


def test_curves_hold_what_was_logged_under_their_key() -> None:
    built = make_report()
    assert len(built.train_loss) == 20
    assert built.train_loss[0] == (5, 1.95)
    assert built.eval_loss == ((0, 3.0), (50, 2.5), (100, 2.0))
    assert built.eval_score == ((0, 0.12), (50, 0.37), (100, 0.62))
    assert make_report(metric=None).eval_score == ()


def test_steps_logged_twice_count_once() -> None:
    history = [
        {"step": step, "loss": loss} for step, loss in ((1, 3.0), (2, 2.5), (3, 9.0), (2, 2.4), (3, 2.0))
    ]
    assert make_report(history=history).train_loss == ((1, 3.0), (2, 2.4), (3, 2.0))


def test_values_that_are_no_numbers_are_gaps() -> None:
    history = [
        {"step": 1, "loss": "0.5"},
        {"step": 2, "loss": "none"},
        {"step": 3, "loss": None},
        {"loss": 1.0},
    ]
    (first, second) = make_report(history=history).train_loss
    assert first == (1, 0.5)
    assert math.isnan(second[1])


# Headline


def test_headline_is_the_score_with_the_one_before_training() -> None:
    assert read_headline(make_report()) == (
        "62.0 %",
        "relaxed_accuracy after 100 steps 12.0 % before training (step 0).",
    )


def test_headline_says_which_steps_it_is_about() -> None:
    history = [{"step": step, "eval_m": score} for step, score in ((20, 0.3), (40, 0.7), (60, 0.5))]
    assert read_headline(make_report(history=history, metric="m")) == (
        "50.0 %",
        "m at step 60 of 100 30.0 % at step 20, the first evaluation. 70.0 % at step 40, the best.",
    )
    assert "The only evaluation." in read_headline(make_report(history=history[:1], metric="m"))[1]


def test_headline_without_a_score_is_the_loss() -> None:
    for values in ({"metric": None}, {"metric": "anls"}):
        assert read_headline(make_report(**values)) == (
            "1.000",
            "training loss after 100 steps 1.950 at step 5.",
        )


def test_headline_does_not_hide_that_training_diverged() -> None:
    history = [{"step": 5, "loss": 2.0}, {"step": 10, "loss": math.nan}]
    assert read_headline(make_report(history=history))[0] == "NaN"
    assert "1 of 2 values are not drawn" in read_text(make_report(history=history))


def test_headline_names_failed_checks() -> None:
    checks = (Check(name="a", passed=True), Check(name="b", passed=False))
    for history in (make_history(), [], [{"step": 1, "loss": 1.0}]):
        assert "1 of 2 checks failed." in read_headline(make_report(history=history, checks=checks))[1]
    assert "failed" not in read_headline(make_report())[1]


# Page


def test_page_shows_every_part() -> None:
    rows = [{"sample_id": f"s{index}", "error": "ImageError: no image"} for index in range(4)]
    built = make_report(
        errors=group_errors(rows),
        options={"hf_token": "hf_abc", "learning_rate": 2e-4},
        gallery=(GalleryItem(sample_id="val-0", question="How many?", prediction="3", score=1.0),),
    )
    text = read_text(built)
    parts = ("Loss", "Evaluation", "Checks of the result", "Samples", "Failed rows by cause", "Learning rate")
    places = [text.index(f" {part} ") for part in (*parts, "Gradient norm", "Options of this run")]
    assert places == sorted(places)
    for expected in ("✓ passed", "18.6 M of 3.77 B", "0.5 %", "5 min 20 s", "(hidden)", "How many?"):
        assert expected in text
    assert "hf_abc" not in render_training_html(built)


def test_a_noisy_loss_is_smoothed_beside_its_values() -> None:
    few = make_report(history=make_history(num_steps=report.MIN_POINTS_TO_SMOOTH, every=1))
    many = make_report(history=make_history(num_steps=400, every=1))
    assert "smoothed" not in read_text(few)
    assert "Smoothed: the mean of a logged loss with the 10 before and after it." in read_text(many)


def test_smoothing_keeps_a_slope_a_constant_and_gaps() -> None:
    steep = tuple((float(step), 100.0 - step) for step in range(90))
    smoothed = report._smooth(steep, reach=10)
    for (_, near), (_, value) in zip(smoothed[:80], steep, strict=False):
        assert near == pytest.approx(value)
    flat = tuple((float(step), math.nan if step == 40 else 2.0) for step in range(90))
    values = [value for _, value in report._smooth(flat, reach=10)]
    assert math.isnan(values.pop(40))
    assert set(values) == {2.0}


def test_full_parameter_training_has_no_adapted_modules() -> None:
    built = make_report(num_targets=None)
    assert "adapted" not in read_text(built) + format_training_table(built)


@pytest.mark.parametrize(
    "history",
    [
        [],
        [{}],
        [{"step": 0}],
        [{"step": 1, "loss": math.inf}],
        [{"step": 1, "loss": 0.0, "eval_loss": math.nan, "eval_relaxed_accuracy": math.nan}],
        [{"step": 0, "eval_relaxed_accuracy": 0.0}],
        [{"step": 100, "train_runtime": 1.0, "train_loss": 0.1}],
    ],
)
def test_nothing_or_little_logged(history: list[dict[str, Any]]) -> None:
    built = make_report(
        history=history, num_steps=0, num_samples=0, samples_per_s=None, num_trainable=0, num_parameters=0
    )
    assert read_text(built).startswith("LoRA on tiny, charts")
    assert "4 samples in = 0 trained on + 4 failed" in format_training_table(built)


def test_control_characters_and_markup_stay_text() -> None:
    dirty = "<b onclick='x'>a\x00b\x1b[31m\ud800\nnext"
    checks = (Check(name=dirty, passed=False, detail=dirty),)
    built = make_report(title=dirty, metric=dirty, checks=checks, options={dirty: dirty})
    page = render_training_html(built)
    assert "<b onclick" not in page
    for text in (page, format_training_table(built)):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", text)
        text.encode()


# Closing table


def test_closing_table_says_first_and_last() -> None:
    lines = format_training_table(make_report()).splitlines()
    assert [line.split() for line in lines[2:5]] == [
        ["train", "loss", "1.950", "5", "1.000", "100"],
        ["eval", "loss", "3.000", "0", "2.000", "100"],
        ["eval", "relaxed_accuracy", "12.0", "%", "0", "62.0", "%", "100"],
    ]
    assert lines[6:] == [
        "400 samples in = 396 trained on + 4 failed",
        "100 steps, 1.24 samples/s, 5 min 20 s elapsed",
        "18.6 M of 3.77 B parameters trained (0.5 %), in 252 adapted modules",
        "PASS loads afresh: 252 modules",
        "PASS changes the base's logits",
    ]


@pytest.mark.parametrize("name", ["a" * 300, "图表" * 60, "two words " * 30, "e\u0301" * 200, "line\nbreak"])
def test_closing_table_fits_the_terminal(name: str) -> None:
    history = [{"step": step, "loss": 1e-9, f"eval_{name}": 0.5} for step in (1, 10**7)]
    checks = (Check(name=name, passed=False, detail=name), Check(name="b", passed=True, detail=name))
    counts = {"num_trainable": 10**12, "num_parameters": 10**15 - 1, "num_targets": 10**6}
    built = make_report(history=history, metric=name, checks=checks, elapsed_s=1e7, num_steps=10**7, **counts)
    lines = format_training_table(built).splitlines()
    assert max(map(display_width, lines)) <= TERMINAL_WIDTH
    assert [line[:4] for line in lines[-2:]] == ["FAIL", "PASS"]
