"""Rows that ask the same are asked once, and answered as if each had been asked."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.rows import TASK, check_travels, make_image
from vlmray.dataset.rows import sample_row
from vlmray.engines import build_engine
from vlmray.engines.base import Engine
from vlmray.engines.fake import FakeEngine
from vlmray.inference.chunks import Reuse
from vlmray.inference.result_folder import RESULT_SCHEMA, pick
from vlmray.inference.reuse.answers import Answers
from vlmray.inference.reuse.folder import COLUMNS
from vlmray.inference.reuse.keys import request_key
from vlmray.inference.stages import answered, generate_rows, prepare_rows, score_row
from vlmray.schema import Completion, Form, GenerationRequest, Row, Sample

MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}]
REQUEST = GenerationRequest(request_id="test-000001", messages=MESSAGES, images=[b"a picture"])


def _others(value: Any) -> list[Any]:
    """Values of the same kind that are none of each other."""
    match value:
        case bool():
            return [not value]
        case int() | float():
            return [value + 1]
        case list():
            return [value * 2, []]
        case tuple():
            return [("a", "b"), ("ab",)]
        case dict():
            return [{"a": 1}, {"a": None}]
        case _:
            return ["other", "others"]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(GenerationRequest)])
def test_the_key_of_a_request_is_all_of_it_but_its_id(name: str) -> None:
    if name == "temperature":
        return
    changed = [dataclasses.replace(REQUEST, **{name: each}) for each in _others(getattr(REQUEST, name))]
    keys = {request_key(each) for each in (REQUEST, *changed)}
    assert len(keys) == (1 if name == "request_id" else 1 + len(changed))
    assert {len(key or b"") for key in keys} == {32}


def test_a_sampled_answer_is_that_of_one_row() -> None:
    assert request_key(dataclasses.replace(REQUEST, temperature=0.1)) is None


def test_images_and_forms_are_told_apart_by_what_they_are() -> None:
    images: list[list[Any]] = [
        [b"a picture"], [b"another"], [b"a picture", b"another"], [b"another", b"a picture"],
        ["http://host/a.png"], ["http://host/b.png"], [b"http://host/a.png"],
    ]  # fmt: skip
    forms = [Form(choices=("a", "b")), Form(regex="a"), Form(schema="a")]
    requests = [dataclasses.replace(REQUEST, images=each) for each in images]
    requests += [dataclasses.replace(REQUEST, form=each) for each in forms]
    assert len({request_key(each) for each in requests}) == len(images) + len(forms)
    with pytest.raises(TypeError, match="by their bytes, got Image"):
        request_key(dataclasses.replace(REQUEST, images=[Image.new("RGB", (2, 2))]))


# In a call of the engine


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    found = build_engine(engine="transformers", model_id=str(tiny_model), batch_size=4, dtype="float32")
    yield found
    found.close()


class Counting:
    """An engine that notes what it is asked."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.prepared: list[str] = []
        self.asked: list[str] = []

    def prepare(self, requests: Sequence[GenerationRequest]) -> Sequence[GenerationRequest]:
        self.prepared += [each.request_id for each in requests]
        return self._engine.prepare(requests)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        found = self._engine.generate(requests)
        self.asked += self.prepared[len(self.asked) :]
        return found


def _rows(asked: Sequence[tuple[bytes | None, str]], **fields: Any) -> list[Any]:
    samples = [
        Sample(
            sample_id=f"test-{at:06d}",
            question=text,
            images=(image,) if image else (),
            answers=("x",),
            **fields,
        )
        for at, (image, text) in enumerate(asked)
    ]
    return check_travels(prepare_rows(check_travels([sample_row(each) for each in samples]), TASK))


A, B = make_image(40, size=(56, 84)), make_image(200, size=(56, 84))
ASKED = [(A, "Why?"), (B, "Why?"), (A, "Why?"), (A, "Who?"), (None, "Why?"), (b"broken", "Why?"), (B, "Why?"),
         (None, "Why?"), (A, "Why?"), (b"broken", "Why?")]  # fmt: skip
FIRSTS = [0, 1, 3, 4]
TWINS = 4


def _finish(rows: Sequence[Row], engine: Any, known: Answers | None) -> list[dict[str, Any]]:
    task = dataclasses.replace(TASK, max_new_tokens=8, num_logprobs=0)
    found = check_travels(generate_rows(copy.deepcopy(rows), engine, task, known=known))  # type: ignore[arg-type]
    return [dict(pick(score_row(row, task), RESULT_SCHEMA.names)) for row in found]


def _sureness(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("confidence", "min_token_probability")}


def test_rows_that_ask_the_same_are_asked_once_and_answered_as_if_each_was(engine: Engine) -> None:
    rows, counting, known = _rows(ASKED), Counting(engine), Answers()
    expected = _finish(rows, engine, None)
    assert sum(row["error"] is None for row in expected) == len(FIRSTS) + TWINS
    assert all(row["confidence"] for row in expected if row["error"] is None)
    found = _finish(rows, counting, known)
    assert found == [{**row, **_sureness(each)} for row, each in zip(expected, found, strict=True)]
    for name in ("confidence", "min_token_probability"):  # which depend on neighbours in the last digits
        values = [[row[name] or 0.0 for row in table] for table in (found, expected)]
        assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert counting.asked == counting.prepared == [f"test-{at:06d}" for at in FIRSTS]
    assert _finish(rows[::-1], counting, known) == found[::-1]  # in another call
    assert len(counting.prepared) == len(FIRSTS)


def test_what_was_taken_over_is_counted_by_where_it_is_from() -> None:
    rows = generate_rows(_rows(ASKED), FakeEngine(), TASK, known=Answers())
    assert Reuse.of(rows) == Reuse(num_identical=TWINS)
    assert all(row.get("num_cached_tokens") is None for row in rows if row.get("taken_from"))
    rows[2]["taken_from"] = "cache"
    assert Reuse.of(rows).plus(Reuse(1, 2)) == Reuse(num_identical=TWINS, num_from_cache=3)


def test_an_error_is_that_of_all_who_ask_the_same_and_is_asked_again() -> None:
    rows, known = _rows([(A, "Why?"), (A, "Why?")]), Answers()
    failed = generate_rows(copy.deepcopy(rows), FakeEngine(max_model_len=1), TASK, known=known)
    assert failed[0]["error"] is not None
    assert failed[1]["error"] == failed[0]["error"]
    assert Reuse.of(failed) == Reuse()
    found = generate_rows(rows, FakeEngine(answer="fine"), TASK, known=known)
    assert [row["prediction"] for row in found] == ["fine", "fine"]


def test_sampled_rows_are_asked_one_by_one() -> None:
    counting = Counting(FakeEngine())
    task = dataclasses.replace(TASK, temperature=0.7)
    rows = [generate_rows(_rows(ASKED), counting, task, known=known) for known in (Answers(), None)]  # type: ignore[arg-type]
    assert rows[0] == rows[1]
    assert len(counting.asked) == 2 * (len(FIRSTS) + TWINS)


@pytest.mark.parametrize("names", [("num_logprobs", None), (None, "num_logprobs")])
def test_a_request_that_asks_for_log_probabilities_gets_them_whoever_was_asked(names: Any) -> None:
    """Those that the run asks for, for the confidence, are not written."""
    rows = [row for name in names for row in _rows([(A, "Why?")], settings={name: 2} if name else {})]
    task = dataclasses.replace(TASK, num_logprobs=2)
    found = generate_rows(rows, FakeEngine(), task, known=Answers())
    assert [row.get("logprobs") is not None for row in found] == [name is not None for name in names]
    assert found[0]["confidence"] == found[1]["confidence"]


def test_all_that_an_answer_says_is_taken_over() -> None:
    """A column that an engine's answer fills has to be named, or its twins would lack it."""
    completion = FakeEngine().generate([dataclasses.replace(REQUEST, images=[A])])[0]
    assert answered(completion).keys() - {"error", "num_cached_tokens"} == {*COLUMNS} - {"logprobs"}


def test_rows_of_which_all_are_known_take_their_turn(engine: Engine) -> None:
    """So that a replica that loaded a model says so, whatever it was asked."""
    rows, known, turns = _rows(ASKED[:1]), Answers(), []

    class Turn:
        def __enter__(self) -> None:
            turns.append("begun")

        def __exit__(self, *_: object) -> None:
            turns.append("ended")

    for _ in range(2):
        generate_rows(copy.deepcopy(rows), engine, TASK, Turn(), known)  # type: ignore[arg-type]
    assert turns == ["begun", "ended"] * 2
    assert json.loads(rows[0]["messages"])
