"""Several answers to each row: drawn each by itself, put to a vote, kept, and reported."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.batches import write_batch
from helpers.results import FORMATS, open_folder, row_of
from helpers.rows import SPEC, TASK, ListSource, check_travels, make_image
from vlmray.benchmark.samples import describe_samples
from vlmray.config import BenchmarkConfig, InferConfig
from vlmray.config.parsing import build_config
from vlmray.dataset.rows import sample_row
from vlmray.engines import build_engine
from vlmray.engines.base import Engine
from vlmray.engines.fake import FakeEngine
from vlmray.engines.openai.wire import with_own_seed
from vlmray.errors import OptionError
from vlmray.inference.drawing.assessing import Drawn, DrawnRow, assess_draws
from vlmray.inference.drawing.gathering import Draws
from vlmray.inference.drawing.report import draw_sections, draw_table
from vlmray.inference.drawing.voting import RowsInFlight, by_row
from vlmray.inference.passing.predictions import prompt_facts
from vlmray.inference.plan import InferenceRun, plan_inference
from vlmray.inference.report import Report, format_table, render_html
from vlmray.inference.result_folder import RESULT_SCHEMA
from vlmray.inference.stages import (
    Task,
    generate_rows,
    make_requests,
    prepare_rows,
    process_single_sample,
    save_rows,
    score_row,
)
from vlmray.inference.summary import Tally
from vlmray.reports.page import Fact, Page, render_page
from vlmray.reports.tables import Cell
from vlmray.reports.text import TERMINAL_WIDTH
from vlmray.schema import Completion, Form, GenerationRequest, Row, Sample, TokenLogprob

CHARTS = "charts?num_rows=3"
DRAWN = dataclasses.replace(TASK, temperature=1.0, num_samples=4)


class Saying(FakeEngine):
    """Says to a row what it is told to, draw by draw; None is an error."""

    def __init__(self, *texts: str | None, chances: Sequence[float] = ()) -> None:
        super().__init__()
        self._texts = texts
        self._chances = chances or [0.5] * len(texts)

    def generate(self, requests: Sequence[GenerationRequest], **options: Any) -> list[Completion]:
        completions = super().generate(requests, **options)
        return [
            dataclasses.replace(said, text="", finish_reason="error", error=f"draw {place} broke")
            if (text := self._texts[place]) is None
            else dataclasses.replace(
                said, text=text, num_completion_tokens=len(text.split()),
                logprobs=(TokenLogprob(token=text, data=None, logprob=-self._chances[place]),),
                num_cached_tokens=place,
            )
            for place, said in enumerate(completions)
        ]  # fmt: skip


def ask(engine: Engine, task: Task = DRAWN, answers: Sequence[str] = ("blue",)) -> Row:
    sample = Sample(sample_id="test-000007", question="Why?", answers=tuple(answers))
    task = dataclasses.replace(task, num_samples=len(engine._texts) if isinstance(engine, Saying) else 4)
    return process_single_sample(sample, engine, task)


def rows_of(number: int, task: Task = DRAWN) -> list[Row]:
    samples = [
        Sample(
            sample_id=f"test-{place:06d}", question=f"What is {place % 5}?", images=(make_image(40 * place),)
        )
        for place in range(number)
    ]
    return prepare_rows(check_travels(list(map(sample_row, samples))), task)


# What is asked


def test_the_requests_of_a_row_stand_together_and_differ_in_their_ids() -> None:
    requests = make_requests(rows_of(3), DRAWN)
    names = [request.request_id for request in requests]
    assert names == [f"test-{row:06d}{draw}" for row in range(3) for draw in ("", "#1", "#2", "#3")]
    for start in range(0, 12, 4):
        first, *others = requests[start : start + 4]
        assert [dataclasses.replace(each, request_id=first.request_id) for each in others] == [first] * 3
    sent = {with_own_seed(request).seed for request in requests}  # a server does not see the ids
    assert len(sent) == 12
    greedy = dataclasses.replace(requests[0], temperature=0.0, seed=7)
    assert with_own_seed(greedy) == greedy


def test_the_first_draw_is_that_of_a_run_with_one_and_batches_change_none(tiny_model: Path) -> None:
    found = []
    for batch_size in (1, 5, 64):
        engine = build_engine(
            engine="transformers", model_id=str(tiny_model), dtype="float32", batch_size=batch_size
        )
        tasks = [dataclasses.replace(DRAWN, num_samples=number, max_new_tokens=8) for number in (1, 4)]
        found.append([[*generate_rows(rows_of(6, task), engine, task)] for task in tasks])
        engine.close()
    one, several = found[0]
    assert [row["prediction"] for row in one] == [row["samples"][0] for row in several]
    assert all(len(set(row["samples"])) > 1 for row in several)
    for others in found[1:]:
        assert [[row["prediction"] for row in rows] for rows in others] == [
            [row["prediction"] for row in rows] for rows in found[0]
        ]
        assert [row["samples"] for row in others[1]] == [row["samples"] for row in several]


def test_completions_that_come_in_any_order_are_told_apart() -> None:
    rows, flying = rows_of(5), RowsInFlight(3)
    for row in rows:
        flying.begin(row)
    order = random.Random(0).sample(range(15), 15)
    completions = FakeEngine().generate(make_requests(rows, dataclasses.replace(DRAWN, num_samples=3)))
    ended = [found for index in order if (found := flying.end(index, completions[index]))]
    assert [row["sample_id"] for row, _ in ended] != [row["sample_id"] for row in rows]
    assert len(ended) == 5
    for row, drawn in ended:
        start = 3 * rows.index(row)
        assert drawn == completions[start : start + 3]


def test_a_completion_too_few_is_told() -> None:
    assert [*by_row("aabb", 2)] == [("a", "a"), ("b", "b")]
    with pytest.raises(ValueError, match="shorter"):
        [*by_row("aab", 2)]


# What becomes of it


def test_the_row_has_the_answer_that_most_draws_give() -> None:
    row = ask(Saying("red", "Blue ones.", "blue  ones", "green", chances=[1, 2, 3, 4]))
    assert (row["prediction"], row["agreement"]) == ("Blue ones.", 0.5)
    assert row["samples"] == ["red", "Blue ones.", "blue  ones", "green"]
    assert row["min_token_probability"] == pytest.approx(0.1353, abs=1e-4)  # of the one that counts
    assert row["num_completion_tokens"] == 6  # all that was written
    assert row["num_prompt_tokens"] == ask(Saying("red"))["num_prompt_tokens"]
    assert row["num_cached_tokens"] == 0


def test_vote_and_draws_are_scored() -> None:
    row = ask(Saying("blue", "red", "Red", "blue."), answers=("red", "rouge"))
    assert (row["prediction"], row["score"], row["sample_scores"]) == ("blue", 0.0, [0.0, 1.0, 1.0, 0.0])
    unscored = ask(Saying("blue", "red", "Red", "blue."), answers=())
    assert (unscored["score"], unscored["sample_scores"], unscored["agreement"]) == (None, None, 0.5)


def test_one_draw_has_no_columns_of_several() -> None:
    row = ask(Saying("blue"))
    assert row["score"] == 1.0
    assert {row[name] for name in ("samples", "sample_scores", "agreement")} == {None}  # type: ignore[literal-required]


def test_a_draw_that_fails_fails_its_row_which_is_asked_again(tmp_path: Path) -> None:
    row = ask(Saying("blue", None, "blue"))
    assert (row["error"], row["finish_reason"], row["prediction"]) == ("draw 1 broke", "error", None)
    assert {row[name] for name in ("samples", "sample_scores", "agreement")} == {None}  # type: ignore[literal-required]
    folder = open_folder(tmp_path)
    save_rows([row], folder)
    assert folder.answered(["test-000007"]) == {}


def test_answers_that_cannot_be_scored_leave_no_draws() -> None:
    task = dataclasses.replace(DRAWN, metric="field_accuracy")
    row = ask(Saying("{}", "[]"), task, answers=('{"a": 1, "$rules": [1]}',))
    assert (row["finish_reason"], row["samples"], row["agreement"]) == ("error", None, None)


def test_the_form_is_that_of_the_majority() -> None:
    task = dataclasses.replace(DRAWN, form=Form(schema='{"type": "object", "required": ["a"]}'))
    row = ask(Saying('{"b": 2}', '{"a": 1, "b": 2}', '{"b": 2.0, "a": 1}'), task)
    assert (row["prediction"], row["parsed"], row["keeps_form"]) == ('{"a": 1, "b": 2}',) * 2 + (True,)
    assert row["agreement"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("output_format", FORMATS)
def test_rows_keep_their_draws_and_older_ones_have_none(tmp_path: Path, output_format: str) -> None:
    folder = open_folder(tmp_path, output_format)
    answered = [score_row(row, DRAWN) for row in generate_rows(rows_of(2), FakeEngine(), DRAWN)]
    save_rows(check_travels(answered), folder)
    columns = ["sample_id", "samples", "sample_scores", "agreement"]
    old = {name: None for name in RESULT_SCHEMA.names if name not in columns[1:]}
    old |= {"sample_id": "test-000009", "row_index": 9, "prediction": "old", "score": 1.0}
    if output_format == "files":
        (tmp_path / "test-000009_out.json").write_text(json.dumps(old))
    else:
        schema = pa.schema([RESULT_SCHEMA.field(name) for name in old])
        pq.write_table(pa.Table.from_pylist([old], schema), tmp_path / "predictions" / "part-old-0.parquet")
    found = {row["sample_id"]: row for row in folder.rows(columns)}
    assert found.pop("test-000009") == dict.fromkeys(columns) | {"sample_id": "test-000009"}
    assert [*found.values()] == [{name: row.get(name) for name in columns} for row in answered]
    assert all(len(set(row["samples"])) == 4 for row in found.values())
    assert RESULT_SCHEMA.names[-1] == "error"


# What is refused, and what a folder is resumed by


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_samples": 0}, "--num_samples must be from 1 to 64, got 0"),
        ({"num_samples": 65, "temperature": 1}, "--num_samples must be from 1 to 64, got 65"),
        (
            {"num_samples": 5},
            "--num_samples 5 would draw the same answer each time, as --temperature is 0; pass a "
            "--temperature such as 0.7",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: dict[str, Any], words: str) -> None:
    for config, said in ((InferConfig, {"sample_slices": "[:]"}), (BenchmarkConfig, {"models": "a=b"})):
        with pytest.raises(OptionError) as refused:
            build_config(config, {**said, **options})
        assert str(refused.value) == words
    own = "@".join(["a=b", *(f"{name}={value}" for name, value in options.items())])
    with pytest.raises(OptionError, match=r"--models a: --num_samples"):
        build_config(BenchmarkConfig, {"models": own})


def planned(folder: Path, **options: Any) -> InferenceRun:
    fake = {"engine": "fake", "model_id": "fake", "dataset_name": CHARTS, "sample_slices": "[:]"}
    return plan_inference(InferConfig(**{**fake, "output_dir": str(folder), **options}))


def test_requests_of_a_batch_file_get_one_answer_each(tmp_path: Path) -> None:
    batch = str(write_batch(tmp_path / "batch.jsonl"))
    with pytest.raises(OptionError, match="--num_samples is not for rows that are requests, of which each"):
        planned(tmp_path / "out", dataset_name=batch, num_samples=2, temperature=1.0)
    assert not (tmp_path / "out").exists()


def test_a_folder_goes_on_with_as_many_draws_as_it_has(tmp_path: Path) -> None:
    def answer_one(run: InferenceRun) -> None:
        run.folder.save([Row(sample_id="test-000000", row_index=0, error=None)], [{}], [()])

    several = {"num_samples": 3, "temperature": 1.0}
    answer_one(planned(tmp_path / "several", **several))
    assert list(planned(tmp_path / "several", **several).pending) == [1, 2]
    for number, said in ((2, "num_samples was 3, now 2"), (1, "num_samples was 3, now None")):
        with pytest.raises(ValueError, match=said):
            planned(tmp_path / "several", num_samples=number, temperature=1.0)
    answer_one(planned(tmp_path / "one"))
    options = json.loads((tmp_path / "one" / "options.json").read_text())
    del options["num_samples"]  # as it was before there was such an option
    (tmp_path / "one" / "options.json").write_text(json.dumps(options))
    assert list(planned(tmp_path / "one", num_samples=1).pending) == [1, 2]


def test_what_was_asked_says_how_often(tmp_path: Path) -> None:
    run = planned(tmp_path, num_samples=3, temperature=1.0)
    assert prompt_facts(run)["answers drawn to each row"] == 3
    config = BenchmarkConfig(models="a=fake", engine="fake", num_samples=3, temperature=1.0)
    plain = dataclasses.replace(config, num_samples=1)
    described, without = (describe_samples({"a": each}, {"a": run}, [])["prompt"] for each in (config, plain))
    assert described == without | {"num_samples": 3}


# What is reported


def some(model: str = "", num_samples: int = 4, num_failed: int = 0) -> Drawn:
    """Rows of which all draws are right, half of them (and the vote), or none."""
    half = [1.0] * (num_samples // 2) + [0.0] * (num_samples - num_samples // 2)
    rows = [
        DrawnRow(1.0, 1.0, [1.0] * num_samples, 0),
        DrawnRow(0.5, 1.0, half, 1),
        DrawnRow(0.25, 0.0, [0.0] * num_samples, 2),
    ] * 20 + [DrawnRow(None, 0.0, [0.0] * num_samples, 3)] * num_failed
    rows = [row._replace(image=place) for place, row in enumerate(rows)]
    return assess_draws(rows, num_samples=num_samples, metric="anls", model=model)


def test_vote_passes_and_agreement_are_told() -> None:
    found = some()
    assert found.majority is not None
    assert (found.majority.mean, found.agreement) == pytest.approx((2 / 3, 7 / 12))
    passes = {k: interval.mean for k, interval in found.passes.items()}
    assert passes == pytest.approx({1: 1 / 2, 2: (1 + 5 / 6) / 3, 4: 2 / 3})
    assert all(each.low < each.mean < each.high for each in found.passes.values())
    assert found.certainty is not None
    assert [bin_.accuracy.mean for bin_ in found.certainty.calibration.bins] == [0.0, 1.0, 1.0]
    assert found.sentence == "4 draws: agreement 58.3 %, vote 66.7 %, pass@1 50.0 %, pass@4 66.7 %"
    assert json.loads(json.dumps(found.to_json()))["pass_at"]["2"]["mean"] == passes[2]
    assert found.figures() == {"agreement": found.agreement} | {f"pass_at_{k}": passes[k] for k in passes}


def test_a_failed_row_is_wrong_and_agrees_with_nothing() -> None:
    found = some(num_failed=20)
    assert found.majority is not None
    assert (found.majority.mean, found.passes[4].mean) == pytest.approx((1 / 2, 1 / 2))
    assert found.agreement == pytest.approx(7 / 12)
    assert found.certainty is not None
    assert (found.certainty.num_asked, found.certainty.calibration.num_samples) == (80, 60)
    lost = assess_draws([DrawnRow(None, 0.0, [0.0] * 4, 0)], num_samples=4, metric="anls")
    assert (lost.agreement, lost.certainty) == (None, None)
    assert "agreement –" in lost.sentence


def test_models_may_have_drawn_differently_often() -> None:
    table = draw_table([some("few", 4), some("many", 6)])
    assert [column.label for column in table.columns] == ["measure", "few", "many"]
    assert [row[0] for row in table.rows] == [
        "draws", "agreement", "majority vote", "pass@1", "pass@2", "pass@4", "pass@6"
    ]  # fmt: skip
    assert table.title == "Drawn several times"
    assert table.rows[0][1:] == ("4", "6")
    assert table.rows[-1][1] == "–"
    assert isinstance(table.rows[-1][2], Cell)
    alike = draw_table([some("one"), some("other")])
    assert (alike.title, alike.rows[0][0]) == ("Drawn 4 times", "agreement")
    assert draw_sections([]) == []


def test_without_answers_there_is_agreement_alone() -> None:
    found = assess_draws([DrawnRow(0.5, None, None, 0)] * 3, num_samples=2, metric="anls")
    assert (found.majority, found.passes, found.certainty) == (None, {}, None)
    (table,) = draw_sections([found])
    assert table.rows == (("agreement", "50.0 %"),)
    assert found.sentence == "2 draws: agreement 50.0 %"


def run_of(rows: list[dict[str, Any]], num_samples: int) -> Any:
    task = dataclasses.replace(TASK, num_samples=num_samples)
    config = SimpleNamespace(target_accuracy=None)
    return SimpleNamespace(source=ListSource(rows), spec=SPEC, task=task, config=config)


def drawn_row(place: int) -> Row:
    scores = [float((place + draw) % 3 > 0) for draw in range(3)]
    return row_of(place) | {"score": scores[0], "sample_scores": scores, "agreement": 1 / (1 + place % 3)}


def test_a_run_s_rows_are_gathered_in_any_order_and_images_count_once() -> None:
    rows = [{"question": "?", "image": make_image(place // 4), "answer": "a"} for place in range(40)]

    def gather(places: Sequence[int]) -> Drawn | None:
        draws = Draws(3)
        for place in places:
            draws.add(drawn_row(place))
        draws.add(row_of(40, error="broken"))
        return draws.assess(run_of(rows, 3))

    found = gather(range(40))
    assert found is not None
    assert found == gather([*reversed(range(40))])
    assert (found.passes[3].num_samples, found.passes[3].num_images) == (40, 10)
    assert found.passes[3].mean == 1.0
    assert found.knows_images
    assert Draws(1).assess(run_of(rows, 1)) is None


def test_page_and_terminal_have_it(tmp_path: Path) -> None:
    rows = [{"question": "?", "image": make_image(place), "answer": "a"} for place in range(30)]
    draws, tally = Draws(3), Tally("exact_match")
    for place in range(30):
        draws.add(drawn_row(place))
        tally.add(drawn_row(place))
    drawn = draws.assess(run_of(rows, 3))
    assert drawn is not None
    summary = tally.summary(1.0, drawn=drawn)
    json.dumps(dataclasses.asdict(summary), allow_nan=False)
    text = format_table(summary)
    assert f"\n{drawn.sentence}" in text
    assert max(map(len, text.splitlines())) <= TERMINAL_WIDTH
    page = render_html(Report(title="x", summary=summary))
    plain = render_page(Page(title="x", headline=Fact("a", "b")))
    for said in ("Drawn 3 times", "pass@2", "Reliability of agreement", "Answers of like agreement"):
        assert said in page
        assert said not in plain
    assert "Drawn" not in render_html(Report(title="x", summary=tally.summary(1.0)))
