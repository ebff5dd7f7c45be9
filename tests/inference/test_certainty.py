"""How sure a model was: what rows have of it, and what a report makes of that."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from helpers.results import open_folder, row_of
from helpers.rows import SPEC, TASK, ListSource, make_image
from vlmray.config import BenchmarkConfig, InferConfig
from vlmray.config.parsing import build_config
from vlmray.engines.fake import FakeEngine
from vlmray.errors import OptionError
from vlmray.inference.certainty.assessing import Certainty, assess
from vlmray.inference.certainty.gathering import Confidences
from vlmray.inference.certainty.report import certainty_sections
from vlmray.inference.stages import answered, process_single_sample
from vlmray.reports.page import Fact, Page, render_page
from vlmray.schema import Completion, Sample, TokenLogprob


def completion(*logprobs: float, **fields: Any) -> Completion:
    return Completion(
        text="x", prompt="", num_prompt_tokens=1, num_completion_tokens=len(logprobs), finish_reason="stop",
        logprobs=tuple(TokenLogprob(token="x", data=b"x", logprob=each) for each in logprobs), **fields,
    )  # fmt: skip


def test_confidence_is_the_probability_of_all_tokens() -> None:
    row = answered(completion(math.log(0.5), math.log(0.8), 0.0))
    assert row["confidence"] == pytest.approx(0.4)
    assert row["min_token_probability"] == pytest.approx(0.5)
    assert answered(completion(1e-7))["confidence"] == 1.0  # rounding makes nothing surer than sure
    assert answered(completion(-math.inf))["confidence"] == 0.0


@pytest.mark.parametrize(
    "without",
    [completion(), dataclasses.replace(completion(-0.5), logprobs=None), completion(-1.0, error="x")],
)
def test_what_is_not_known_is_null(without: Completion) -> None:
    row = answered(without)
    assert (row["confidence"], row["min_token_probability"]) == (None, None)


@pytest.mark.parametrize("output_format", ["files", "parquet"])
def test_rows_keep_it_and_older_ones_have_none(tmp_path: Path, output_format: str) -> None:
    folder = open_folder(tmp_path, output_format)
    task = dataclasses.replace(TASK, num_logprobs=0)
    sample = Sample(sample_id="test-000001", question="Why?", answers=("a",))
    row = process_single_sample(sample, FakeEngine(), task, folder)
    assert 0 < row["confidence"] <= row["min_token_probability"] < 1
    if output_format == "parquet":
        old = {"sample_id": "test-000000", "row_index": 0, "score": 1.0, "error": None}
        import pyarrow as pa

        pq.write_table(pa.Table.from_pylist([old]), tmp_path / "predictions" / "part-old-0.parquet")
    else:
        (tmp_path / "test-000000_out.json").write_text(
            '{"sample_id": "test-000000", "row_index": 0, "score": 1.0, "error": null}'
        )
    found = {each["sample_id"]: each["confidence"] for each in folder.rows(["sample_id", "confidence"])}
    assert found == {"test-000000": None, "test-000001": row["confidence"]}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0),
        ({"confidence": False}, None),
        ({"endpoint": "http://x"}, None),
        ({"endpoint": "http://x", "confidence": True}, 0),
        ({"endpoint": "http://x", "target_accuracy": 0.9}, 0),
    ],
)
def test_it_is_asked_for_unless_somebody_elses_server_answers(
    options: dict[str, Any], expected: int | None
) -> None:
    config = build_config(InferConfig, {"sample_slices": "[:]", **options})
    assert config.wanted_logprobs(asks_server=config.endpoint is not None) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_accuracy": 1.0}, "above 0 and below 1, got 1"),
        ({"target_accuracy": 95}, "above 0 and below 1, got 95"),
        ({"target_accuracy": 0.9, "confidence": False}, "what --confidence false leaves out"),
        ({"target_accuracy": 0.9, "metrics": "none"}, "--metrics none has none"),
    ],
)
def test_targets_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        build_config(BenchmarkConfig, {"models": "a=b", **options})


def some(num: int = 400, **options: Any) -> Certainty:
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.4, 1, num)
    right = (rng.uniform(size=num) < sure).astype(float)
    answers = zip(sure.tolist(), right.tolist(), np.arange(num) // 2, strict=True)
    found = assess(answers, **{"metric": "anls", "num_asked": num, "target": 0.8, **options})
    assert found is not None
    return found


def test_the_sentence_says_what_the_target_costs() -> None:
    found = some(num_asked=500, model="tuned")
    threshold = found.threshold
    assert threshold is not None
    assert threshold.confidence is not None
    assert found.sentence == (
        f"tuned: from a confidence of {threshold.confidence:.6g} on, answers keep anls of at least 80.0 % "
        f"(95 % sure): {100 * threshold.coverage:.1f} % of the 500 samples, and here they have "
        f"{100 * (threshold.accuracy or 0):.1f} %."
    )
    too_much, too_few = some(target=0.999).sentence, some(num=20, target=0.5).sentence
    start = "no confidence is shown to keep anls of at least"
    assert too_much.startswith(f"{start} 99.9 % (95 % sure); the surest tenth have ")
    assert too_few.startswith(
        f"{start} 50.0 % (95 % sure); more samples might show one: the surest tenth have"
    )


def test_the_page_has_table_and_plots() -> None:
    sections = certainty_sections([some(model="base"), some(model="tuned", target=0.999)])
    page = render_page(Page(title="x", headline=Fact("a", "b"), sections=tuple(sections)))
    for text in ("How sure", "Reliability", "Risk against coverage", "as right as sure", "tuned"):
        assert text in page
    assert certainty_sections([]) == []


def run_of(rows: list[dict[str, Any]], target: float | None = None) -> Any:
    return SimpleNamespace(
        source=ListSource(rows), spec=SPEC, task=TASK, config=SimpleNamespace(target_accuracy=target)
    )


def test_rows_of_one_image_count_as_one() -> None:
    rows = [{"question": "?", "image": make_image(place // 4), "answer": "a"} for place in range(40)]
    confidences = Confidences()
    for place in reversed(range(40)):
        confidences.add(row_of(place) | {"score": float(place % 3 > 0), "confidence": 0.5})
    found = confidences.assess(run_of(rows))
    assert found is not None
    assert (found.calibration.num_samples, found.calibration.num_images) == (40, 10)
    assert found.knows_images


def test_what_has_no_confidence_is_told(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"question": "?", "image": None, "answer": "a"}] * 3
    confidences = Confidences()
    for place, confidence in enumerate([None, 0.5, None]):
        confidences.add(row_of(place) | {"confidence": confidence})
    confidences.add(row_of(3, error="broken"))
    with caplog.at_level(logging.WARNING):
        found = confidences.assess(run_of(rows, target=0.9))
    assert "2 of 3 answers have no confidence" in caplog.text
    assert found is not None
    assert found.num_asked == 4
    assert Confidences().assess(run_of(rows)) is None
