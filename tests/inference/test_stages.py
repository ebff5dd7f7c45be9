"""Stages: every selected row exactly once and in order, and a bad row hurts no other."""

from __future__ import annotations

import copy
import dataclasses
import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.rows import SPEC, TASK, ListSource, check_travels, make_image
from vlmray.dataset.rows import fetch_images, read_chunk, sample_row
from vlmray.engines.fake import FakeEngine
from vlmray.images.decoding import encode_jpeg
from vlmray.inference.result_folder import ABSENT, RESULT_SCHEMA, ResultFolder
from vlmray.inference.stages import (
    Task,
    generate_rows,
    make_requests,
    prepare_rows,
    process_single_sample,
    save_rows,
    score_row,
)
from vlmray.schema import Completion, Form, GenerationRequest, Sample


def _some(image: Any) -> tuple[Any, ...]:
    return () if image is None else (image,)


def _prepared(image: Any = None, question: str = "Why?", task: Task = TASK, **fields: Any) -> dict[str, Any]:
    sample = Sample(sample_id="test-000007", question=question, images=_some(image), **fields)
    (row,) = prepare_rows(check_travels([sample_row(sample)]), task)
    return row


def test_messages_are_built() -> None:
    task = Task(prompt_template="Q: {question}\n{choices}", system_prompt="Be brief.", metric="exact_match")
    row = _prepared(make_image(), "Größe?", task, choices=("red", "blue"))
    assert row["error"] is None
    system, user = json.loads(row["messages"])
    assert system["content"] == [{"type": "text", "text": "Be brief."}]
    assert user["content"] == [{"type": "image"}, {"type": "text", "text": "Q: Größe?\nA. red\nB. blue"}]
    assert [part["type"] for part in json.loads(_prepared()["messages"])[0]["content"]] == ["text"]


@pytest.mark.parametrize(
    ("image", "question", "error"),
    [
        (None, "", "empty question"),
        (None, " \n", "empty question"),
        (b"", "Why?", "image has 0 bytes"),
        (b"not an image", "Why?", "cannot identify image"),
        (make_image(kind="JPEG", size=(200, 200))[:-300], "Why?", "truncated image"),
        ("gone.png", "Why?", "no such file: gone.png"),
        ("", "Why?", "image source is an empty string"),
        ("data:image/png;base64,%%%", "Why?", "data URI is not valid base64"),
        ("ftp://example.org/a.png", "Why?", "unsupported URL scheme 'ftp'"),
        (5, "Why?", "unsupported image source int"),
    ],
)
def test_bad_rows_say_why(image: Any, question: str, error: str) -> None:
    row = _prepared(image, question)
    assert error in row["error"]
    assert "\n" not in row["error"]
    assert row.get("messages") is None


def test_more_choices_than_letters_is_a_bad_row() -> None:
    assert "40 choices" in _prepared(choices=tuple(map(str, range(40))))["error"]


def test_a_bad_row_hurts_no_neighbour_with_the_same_image() -> None:
    def row(number: int, image: bytes | None, question: str = "Why?") -> dict[str, Any]:
        return sample_row(Sample(sample_id=f"test-{number:06d}", question=question, images=_some(image)))

    good, bad = make_image(1), b"broken"
    rows = [
        row(0, good),
        row(1, good, ""),
        row(2, good),
        row(3, bad),
        row(4, bad),
        row(5, None),
        row(6, good),
    ]
    errors = [prepared["error"] for prepared in prepare_rows(rows, TASK)]
    assert [error is None for error in errors] == [True, False, True, False, False, True, True]
    assert errors[3] == errors[4]


def test_paths_start_at_the_sources_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(make_image(3))
    monkeypatch.chdir(tmp_path)
    rows = [{"question": "Why?", "image": path, "answer": "x"} for path in ("a.png", "gone.png")]
    found, missing = read_chunk(ListSource(rows, str(tmp_path / "data")), SPEC, "test", [0, 1], 0, 2)
    assert found["images"] == [make_image(3)]
    assert missing["error"] == f"no such file: {tmp_path}/data/gone.png"


class _Pictures(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = {"/a.png": make_image(9), "/text.png": b"hello"}.get(self.path)
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Pictures)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_urls_are_fetched_when_rows_are_prepared(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    urls = [f"{address}/a.png", f"{address}/gone.png", f"{address}/text.png", "http://127.0.0.1:9/a.png"]
    samples = [
        Sample(sample_id=f"test-{n:06d}", question="Why?", images=(url,)) for n, url in enumerate(urls)
    ]
    rows = check_travels([sample_row(sample) for sample in samples])
    assert all(row["images"] == [None] for row in rows)
    rows = check_travels(prepare_rows(rows, TASK))
    assert rows[0]["images"] == [make_image(9)]
    assert rows[0]["error"] is None
    assert rows[1]["error"] == f"HTTP 404 for {address}/gone.png"
    assert "cannot identify image" in rows[2]["error"]
    assert "cannot fetch http://127.0.0.1:9/a.png" in rows[3]["error"]


def test_only_urls_are_fetched(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    images = [make_image(1), None, f"{address}/a.png", f"{address}/gone.png"]
    rows = [
        sample_row(Sample(sample_id="test-000000", question="Why?", images=_some(image))) for image in images
    ]
    before = copy.deepcopy(rows)
    fetch_images(rows)
    assert rows[:2] == before[:2]
    assert rows[2] == {**before[2], "images": [make_image(9)]}
    assert rows[3] == {**before[3], "error": f"HTTP 404 for {address}/gone.png"}


def _rows(num_rows: int) -> list[dict[str, Any]]:
    """Prepare rows of which every fourth is bad, three to an image."""
    samples = [
        Sample(
            sample_id=f"test-{n:06d}",
            question="" if n % 4 == 3 else f"Question {n}?",
            answers=("x",),
            images=(make_image(n // 3),),
        )
        for n in range(num_rows)
    ]
    return prepare_rows([sample_row(sample) for sample in samples], TASK)


def test_answers_do_not_depend_on_chunks() -> None:
    engine = FakeEngine.from_model_id("fake")
    together = check_travels(generate_rows(_rows(14), engine, TASK))
    alone = [generate_rows([row], engine, TASK)[0] for row in _rows(14)]
    assert check_travels(alone) == together
    answered = [row for row in together if row["error"] is None]
    assert [row["sample_id"] for row in together] == [f"test-{n:06d}" for n in range(14)]
    assert len({row["prediction"] for row in answered}) == len(answered) == 11
    assert all(row.get("prediction") is None for row in together if row["error"])


class _Recorder(FakeEngine):
    """An engine that keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Sequence[GenerationRequest]] = []

    def generate(self, requests: Sequence[GenerationRequest], **options: Any) -> list[Completion]:
        self.calls.append(requests)
        return super().generate(requests, **options)


def test_an_engine_is_asked_once_for_the_rows_without_error() -> None:
    drawn: dict[str, Any] = {
        "max_new_tokens": 7, "min_new_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1,
        "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": -0.4, "seed": 3,
    }  # fmt: skip
    task = Task(prompt_template="{question}", metric="anls", **drawn)
    engine = _Recorder()
    generate_rows(_rows(8), engine, task)
    (requests,) = engine.calls
    assert [request.request_id for request in requests] == [f"test-{n:06d}" for n in (0, 1, 2, 4, 5, 6)]
    assert requests[0].images == requests[1].images  # encoded: the engine decodes, ahead of the model
    assert all(isinstance(image, bytes) for request in requests for image in request.images)
    for request in requests:
        assert {name: getattr(request, name) for name in drawn} == drawn
        assert len(request.images) == 1
    generate_rows(prepare_rows([_prepared(question="")], TASK), engine, task)
    assert len(engine.calls) == 1


def test_errors_of_the_engine_stay_with_their_row() -> None:
    engine = FakeEngine.from_model_id("fake?error_every=5")
    rows = [score_row(row, TASK) for row in generate_rows(_rows(11), engine, TASK)]
    assert [n for n, row in enumerate(rows) if row["error"]] == [0, 3, 5, 7, 10]
    for row in rows:
        assert (row["finish_reason"] == "error") == (row["error"] is not None)
        assert (row.get("score") is None) == (row["error"] is not None)


@pytest.mark.parametrize(
    ("answers", "score"), [(["42"], 1.0), (["41"], 0.0), (["41", "42"], 1.0), ([], None)]
)
def test_scores(answers: list[str], score: float | None) -> None:
    sample = Sample(sample_id="test-000000", question="Why?", answers=tuple(answers))
    row = process_single_sample(sample, FakeEngine.from_model_id("fake?answer=42"), TASK)
    assert row["prediction"] == "42"
    assert row.get("score") == score
    assert row.get("metric") == (None if score is None else "exact_match")


@pytest.mark.parametrize(("question", "image"), [(" ", None), ("Why?", b"no image"), ("Why?", None)])
def test_a_single_sample_has_all_columns(question: str, image: bytes | None) -> None:
    sample = Sample(sample_id="x", question=question, images=_some(image))
    row = process_single_sample(sample, FakeEngine(), TASK)
    assert set(RESULT_SCHEMA.names) <= set(row)
    assert (row["prediction"] is None) == (row["error"] is not None) == (row["finish_reason"] == "error")


@pytest.mark.parametrize("rules", ['"0,01"', "[1]", '{"a": "nearly"}'])
def test_an_answer_that_no_rule_can_score_is_an_error_of_its_row(rules: str) -> None:
    task = dataclasses.replace(TASK, metric="field_accuracy")
    sample = Sample(sample_id="x", question="Why?", answers=(f'{{"a": 1, "$rules": {rules}}}',))
    row = process_single_sample(sample, FakeEngine.from_model_id('fake?answer={"a":2}'), task)
    assert (row["finish_reason"], row["prediction"], row["score"]) == ("error", None, None)
    assert row["error"] is not None
    assert row["error"].startswith("the row's answers cannot be scored: ")


def test_a_single_sample_is_saved(tmp_path: Path) -> None:
    folder = ResultFolder.open(str(tmp_path), {})
    sample = Sample(
        sample_id="test-000003", question="Größe?", answers=("42",), images=(make_image(5),), family="f"
    )
    row = process_single_sample(sample, FakeEngine.from_model_id("fake?answer=42"), TASK, folder)
    asked = json.loads((tmp_path / "test-000003_in.json").read_text(encoding="utf-8"))
    result = json.loads((tmp_path / "test-000003_out.json").read_text(encoding="utf-8"))
    assert asked["image"] == "test-000003_img.jpg"
    assert asked["question"] == "Größe?"
    assert asked["messages"] == json.loads(row["messages"])
    assert result == {name: row.get(name) for name in RESULT_SCHEMA.names}
    assert (result["prediction"], result["score"], result["family"]) == ("42", 1.0, "f")
    assert folder.read_results().to_pylist() == [result]
    with Image.open(tmp_path / asked["image"]) as picture:
        assert picture.format == "JPEG"
        assert picture.size == (32, 24)


@pytest.mark.parametrize(
    ("image", "question"),
    [
        (None, "Why?"),
        (b"broken", "Why?"),
        (make_image(kind="JPEG", size=(200, 200))[:-300], "Why?"),  # its header is fine
        (make_image(), ""),
        (make_image(size=(70_000, 2)), "Why?"),  # no JPEG has so many pixels to a side
    ],
)
def test_what_was_not_asked_or_is_no_jpeg_leaves_no_picture(
    image: bytes | None, question: str, tmp_path: Path
) -> None:
    folder = ResultFolder.open(str(tmp_path), {})
    sample = Sample(sample_id="test-000000", question=question, images=_some(image))
    process_single_sample(sample, FakeEngine(), TASK, folder)
    assert not (tmp_path / "test-000000_img.jpg").exists()
    assert json.loads((tmp_path / "test-000000_in.json").read_text())["image"] is None
    assert (folder.states(2) != ABSENT).tolist() == [True, False]


def test_rows_that_travelled_are_saved(tmp_path: Path) -> None:
    rows = [score_row(row, TASK) for row in generate_rows(_rows(9), FakeEngine(), TASK)]
    for output_format in ("files", "parquet", "both"):
        folder = ResultFolder.open(str(tmp_path / output_format), {}, output_format=output_format)
        save_rows(check_travels(rows), folder)
        results = sorted(folder.read_results().to_pylist(), key=lambda row: row["sample_id"])
        assert results == [{name: row.get(name) for name in RESULT_SCHEMA.names} for row in rows]
        pictures = sorted(path.name for path in (tmp_path / output_format).glob("*_img.jpg"))
        asked = [f"{row['sample_id']}_img.jpg" for row in rows if row["error"] is None]
        assert pictures == ([] if output_format == "parquet" else asked)


def test_several_images_are_asked_and_kept_in_order(tmp_path: Path) -> None:
    images = make_image(1), make_image(2), make_image(3)
    question = "Is <image> more like <image> or <image>?"
    sample = Sample(sample_id="test-000003", question=question, images=images)
    folder = ResultFolder.open(str(tmp_path), {})
    engine = _Recorder()
    process_single_sample(sample, engine, TASK, folder)
    ((request,),) = engine.calls
    assert tuple(request.images) == images
    kinds = [part.get("text", part["type"]) for part in request.messages[0]["content"]]
    assert kinds == ["Is ", "image", " more like ", "image", " or ", "image", "?"]
    asked = json.loads((tmp_path / "test-000003_in.json").read_text(encoding="utf-8"))
    assert asked["image"] == "test-000003_img.jpg"
    assert asked["images"] == [f"test-000003_img{n}.jpg" for n in ("", "_2", "_3")]
    assert folder.read_images("test-000003") == [(tmp_path / name).read_bytes() for name in asked["images"]]
    assert folder.read_images("test-000003") == [encode_jpeg(image) for image in images]


def test_one_broken_image_of_several_fails_its_row() -> None:
    sample = Sample(sample_id="test-000000", question="Why?", images=(make_image(1), b"broken"))
    row = process_single_sample(sample, FakeEngine(), TASK)
    assert "cannot identify image" in row["error"]


OBJECT = Form(schema='{"type": "object", "required": ["a"]}')


@pytest.mark.parametrize(
    ("form", "prediction", "parsed", "keeps_form"),
    [
        (OBJECT, '{"a": 1}', '{"a": 1}', True),
        (OBJECT, "{}", "{}", False),
        (OBJECT, '{"a": "cut', None, False),
        (OBJECT, '{"a": NaN}', None, False),
        (Form(choices=("1", "2")), "1", None, True),
        (Form(choices=("1", "2")), "12", None, False),
        (Form(regex="[0-9]+"), "12", None, True),
        (Form(regex="[0-9]+"), "12 km", None, False),
        (None, '{"a": 1}', None, None),
    ],
)
def test_what_parses_and_what_is_of_the_form_asked_for_is_noted(
    form: Form | None, prediction: str, parsed: str | None, keeps_form: bool | None
) -> None:
    task = dataclasses.replace(TASK, form=form)
    row = score_row(_prepared(make_image(), task=task) | {"prediction": prediction}, task)
    assert (row["parsed"], row["keeps_form"]) == (parsed, keeps_form)


def test_a_request_has_a_form_of_its_own() -> None:
    task = dataclasses.replace(TASK, form=Form(regex="x"))
    own = {"form": {"schema": None, "choices": ["a", "b"], "regex": None}}
    rows = [_prepared(make_image(), task=task), _prepared(make_image(), task=task, settings=own)]
    assert [each.form for each in make_requests(rows, task)] == [task.form, Form(choices=("a", "b"))]
