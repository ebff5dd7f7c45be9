"""Conversations: asked as inference asks, one image each, and a bad row hurts no other."""

from __future__ import annotations

import pickle
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from PIL import Image

from vlmray.builtin import charts
from vlmray.dataset.columns import get_dataset_columns
from vlmray.dataset.registry import DatasetSpec
from vlmray.dataset.rows import read_rows
from vlmray.dataset.slices import parse_sample_slices
from vlmray.dataset.sources import Source, open_source
from vlmray.images.decoding import decode_image
from vlmray.inference.stages import Task, make_requests, prepare_rows
from vlmray.training.samples import (
    SAMPLE_SCHEMA,
    Conversations,
    check_answers,
    group_turns,
    open_images,
    to_feature,
)

SPEC = DatasetSpec(question_column="question", image_column="image", answer_column="answer")
OPTIONAL = replace(SPEC, image_optional=True)


def _image(
    number: int = 0, *, kind: str = "PNG", size: tuple[int, int] = (32, 24), mode: str = "RGB"
) -> bytes:
    picture = Image.new(mode, size, number)
    picture.putpixel((0, 0), 255)
    buffer = BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


class _ListSource:
    """A source over rows in memory."""

    on_driver = True
    same_image_column = None

    def __init__(self, rows: list[dict[str, Any]], base_dir: str | None = None) -> None:
        self._rows = rows
        self.base_dir = base_dir
        self.column_names = list(rows[0])

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        return [{name: self._rows[index][name] for name in columns or self.column_names} for index in indices]


def _row(image: Any = None, question: str | None = "Why?", answer: Any = "x") -> dict[str, Any]:
    return {"question": question, "image": image, "answer": answer}


def _conversations(source: Source, spec: DatasetSpec = SPEC, **options: Any) -> Conversations:
    options.setdefault("turns", [(index,) for index in range(len(source))])
    return Conversations(source=source, spec=spec, split="train", **options)


def _through_arrow(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Send rows to another process as Ray Data does, and see that no column is lost."""
    assert all(set(row) <= set(SAMPLE_SCHEMA.names) for row in rows)
    return pa.Table.from_pylist(rows, SAMPLE_SCHEMA).to_pylist()


def _features(conversations: Conversations, samples: Sequence[int | None]) -> list[dict[str, Any] | None]:
    """Read samples and hand them to the collator, over both process borders."""
    rows = open_images(_through_arrow(conversations.read(samples)))
    return [to_feature(row) for row in _through_arrow(rows)]


# Wording


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Parquet file of rows in runs of one image, some without any, two runs with the same image."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answer": datasets.List(datasets.Value("string")),
        }
    )
    images = [0, 0, 0, None, None, 1, 2, 2, 2, 2, 2, 2, 0, 0, None, 1]
    columns = {
        "image": [None if n is None else {"bytes": _image(n), "path": None} for n in images],
        "question": [f"Größe {index}?" for index in range(len(images))],
        "answer": [[f"answer {index}", "other"] for index in range(len(images))],
    }
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "runs.parquet")
        yield folder / "runs.parquet"


@pytest.mark.parametrize("system_prompt", [None, "", "Be brief."])
@pytest.mark.parametrize(
    ("name", "template"), [("charts?num_rows=4", "{question}"), ("runs", "Look.\n{question} One word.")]
)
def test_what_is_trained_is_what_is_asked(
    name: str, template: str, system_prompt: str | None, runs: Path
) -> None:
    source = open_source(str(runs) if name == "runs" else name, "train")
    spec = get_dataset_columns(name, source.column_names, prompt_template=template)
    spec = replace(spec, image_optional=True)
    task = Task(prompt_template=template, system_prompt=system_prompt, metric="exact_match")
    rows = prepare_rows(read_rows(source, spec, "train", range(len(source))), task)
    requests = make_requests(rows, task)
    conversations = _conversations(source, spec, system_prompt=system_prompt)
    for row, request, feature in zip(
        rows, requests, _features(conversations, range(len(source))), strict=True
    ):
        *prompt, answer = feature["messages"]
        assert feature["sample_id"] == request.request_id
        assert prompt == request.messages
        assert answer == {"role": "assistant", "content": [{"type": "text", "text": row["answers"][0]}]}
        assert [image.tobytes() for image in feature["images"]] == [
            decode_image(image).tobytes() for image in request.images
        ]
    assert any(request.images for request in requests)


def test_choices_are_asked_and_answered_by_letter() -> None:
    spec = DatasetSpec(question_column="question", answer_column="answer", choices_column="choices")
    source = _ListSource([{"question": "Which?", "answer": 1, "choices": ["red", "blue"]}])
    (row,) = prepare_rows(
        read_rows(source, spec, "train", [0]), Task(prompt_template="{question}", metric="exact_match")
    )
    (feature,) = _features(_conversations(source, spec), [0])
    (request,) = make_requests([row], Task(prompt_template="{question}", metric="exact_match"))
    assert feature["messages"][:-1] == request.messages
    assert feature["messages"][-1]["content"][0]["text"] == "B"


def test_later_turns_ask_without_image_and_system_prompt(runs: Path) -> None:
    source = open_source(str(runs), "train")
    whole = _conversations(source, system_prompt="Be brief.", turns=[(0, 1, 2), (7, 6)])
    single = _conversations(source, system_prompt="Be brief.")
    for turns, feature in zip(whole.turns, _features(whole, [0, 1]), strict=True):
        alone = [row["messages"] for row in _features(single, turns)]
        assert feature["sample_id"] == f"train-{turns[0]:06d}"
        assert len(feature["images"]) == 1
        assert feature["messages"][:3] == alone[0]
        for turn, (_, question, answer) in enumerate(alone):
            later = {**question, "content": [part for part in question["content"] if part["type"] == "text"]}
            if turn:
                assert feature["messages"][1 + 2 * turn : 3 + 2 * turn] == [later, answer]
        assert len(feature["messages"]) == 1 + 2 * len(turns)


# Grouping


def _check_groups(groups: Sequence[Sequence[int]], selected: Sequence[int], images: Any, most: int) -> None:
    """Every row once and in order, one image to a group, and no group that could have been longer."""
    assert [index for group in groups for index in group] == list(selected)
    assert all(1 <= len(group) <= most for group in groups)
    for group in groups:
        assert len(group) == 1 or images(group[0]) is not None
        assert all(images(index) == images(group[0]) for index in group)
    for one, next_one in pairwise(groups):
        if images(one[-1]) is not None and images(one[-1]) == images(next_one[0]):
            assert len(one) == most


@pytest.mark.parametrize("kind", ["charts", "path", "uri"])
def test_groups_are_about_one_image(kind: str, runs: Path) -> None:
    name = {"charts": "charts?num_rows=18&questions_per_image=3", "path": str(runs), "uri": runs.as_uri()}[
        kind
    ]
    source = open_source(name, "train")
    images = [row["image"] for row in source.read(range(len(source)))]
    for slices in ("[:]", "[::-1]", "[3:],[0:3]", "[::2]", "[12:14],[0:3]", "[0],[5]"):
        selected = parse_sample_slices(slices, len(source))
        for max_turns in (1, 2, 5):
            groups = group_turns(source, SPEC, selected, max_turns)
            _check_groups(groups, selected, images.__getitem__, max_turns)
    assert max(map(len, group_turns(source, SPEC, range(len(source)), 5))) == (3 if kind == "charts" else 5)


def test_groups_over_more_rows_than_are_read_at_once() -> None:
    rng = random.Random(0)
    numbers = [n for n in range(400) for _ in range(rng.randint(1, 4))]
    source = _ListSource([_row(str(n)) for n in numbers])
    for max_turns in (2, 3, 5):
        groups = group_turns(source, SPEC, range(len(source)), max_turns)
        _check_groups(groups, range(len(source)), numbers.__getitem__, max_turns)


@pytest.mark.parametrize("nothing", [None, [], {"bytes": None, "path": None}])
def test_rows_without_an_image_share_none(nothing: Any) -> None:
    source = _ListSource([_row(nothing) for _ in range(4)])
    assert list(group_turns(source, OPTIONAL, range(4), 5)) == [[0], [1], [2], [3]]
    plain = DatasetSpec(question_column="question", answer_column="answer")
    assert list(group_turns(source, plain, range(4), 5)) == [[0], [1], [2], [3]]


def test_a_column_that_looks_like_the_charts_is_not_trusted() -> None:
    rows = [{**_row(str(n // 2)), "image_id": 7} for n in range(6)]
    assert list(group_turns(_ListSource(rows), SPEC, range(6), 5)) == [[0, 1], [2, 3], [4, 5]]


def test_nothing_is_drawn_to_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "draw_chart", lambda chart: pytest.fail("a chart was drawn"))
    source = open_source("charts?num_rows=600&questions_per_image=4", "train")
    spec = get_dataset_columns("charts", source.column_names)
    check_answers(source, spec, "train", range(600))
    groups = group_turns(source, spec, range(600), 4)
    assert list(groups) == [list(range(start, start + 4)) for start in range(0, 600, 4)]
    assert groups[-1] == groups[149]
    assert list(groups[148:]) == [groups[148], groups[149]]
    assert len(pickle.dumps(groups)) < 600 * 8 + 150 * 8 + 1000


# Answers


@pytest.mark.parametrize(
    "empty", [None, "", " \n", [], [""], {"answer": ""}, [{"answer": "", "answer_id": 1}]]
)
def test_nothing_to_learn(empty: Any) -> None:
    source = _ListSource([_row(answer=empty) for _ in range(600)])
    with pytest.raises(
        ValueError, match="--answer_column: all 600 selected rows of split 'train' have an empty 'answer'"
    ):
        check_answers(source, SPEC, "train", range(600))
    for answer in ("x", 0, False, ["", "x"], [{"answer": "x", "answer_id": 1}]):
        last = _ListSource([*(_row(answer=empty) for _ in range(600)), _row(answer=answer)])
        check_answers(last, SPEC, "train", range(601))
        with pytest.raises(ValueError, match="--answer_column"):
            check_answers(last, SPEC, "train", range(600))


def test_an_answer_column_is_needed() -> None:
    spec = DatasetSpec(question_column="question")
    with pytest.raises(ValueError, match="--answer_column is needed to train; the columns are question, im"):
        check_answers(_ListSource([_row()]), spec, "train", [0])


# Bad rows


def test_bad_rows_are_named_and_hurt_no_other(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_image(3))
    bad = {
        "cannot identify image": _row(b"broken"),
        "truncated image": _row(_image(kind="JPEG", size=(200, 200))[:-300]),
        "image has 0 bytes": _row({"bytes": b"", "path": "a.png"}),
        "empty question": _row(_image(), None),
        "no answer to train on": _row(_image(), answer=[]),
        "no such file": _row("gone.png"),
        "the text has 1 place for an image, and the row has 2 images": _row(["a.png"] * 2, "<image>?"),
        "no image in column 'image'": _row(None),
    }
    good = [_row("a.png", f"{n}?") for n in range(len(bad) + 1)]
    rows = [row for pair in zip(good, bad.values(), strict=False) for row in pair] + good[-1:]
    conversations = _conversations(_ListSource(rows, str(tmp_path)))
    features = _features(conversations, range(len(rows)))
    for index, feature in enumerate(features):
        assert feature["sample_id"] == f"train-{index:06d}"
        assert feature == _features(conversations, [index])[0]
    for message, feature in zip(bad, features[1::2], strict=True):
        assert message in feature["error"]
        assert "\n" not in feature["error"]
        assert "messages" not in feature
    for feature in features[::2]:
        assert "error" not in feature
        assert feature["images"][0].tobytes() == decode_image(_image(3)).tobytes()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (_row(_image(1), ""), "empty question"),
        (_row(_image(1), answer=[]), "no answer to train on"),
        (_row("gone.png"), "no such file"),
    ],
)
def test_a_bad_turn_fails_its_conversation_alone(bad: dict[str, Any], message: str) -> None:
    rows = [_row(_image(n // 3)) for n in range(9)]
    rows[4] = bad
    conversations = _conversations(_ListSource(rows), turns=[(0, 1, 2), (3, 4, 5), (6, 7, 8)])
    first, second, third = _features(conversations, range(3))
    assert second["sample_id"] == "train-000003"
    assert message in second["error"]
    assert "error" not in first
    assert "error" not in third


# Images and slots


@pytest.mark.parametrize("size", [(1, 1), (31, 7), (200, 3)])
@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "RGB"), ("PNG", "L"), ("PNG", "P"), ("JPEG", "RGB"), ("JPEG", "L"), ("GIF", "P")],
)
def test_pixels_arrive_as_they_were(kind: str, mode: str, size: tuple[int, int]) -> None:
    data = _image(77, kind=kind, size=size, mode=mode)
    (feature,) = _features(_conversations(_ListSource([_row(data)])), [0])
    (picture,) = feature["images"]
    assert (picture.mode, picture.size) == ("RGB", size)
    assert picture.tobytes() == decode_image(data).tobytes()


def test_a_sample_is_the_same_in_any_batch_and_slots_stay_empty() -> None:
    source = open_source("charts?num_rows=12&questions_per_image=3", "train")
    spec = get_dataset_columns("charts", source.column_names)
    conversations = _conversations(source, spec, turns=group_turns(source, spec, range(12), 2))
    alone = [_features(conversations, [sample])[0] for sample in range(len(conversations))]
    rng = random.Random(0)
    for _ in range(20):
        samples = [rng.choice([None, *range(len(conversations))]) for _ in range(rng.randint(1, 6))]
        expected = [None if sample is None else alone[sample] for sample in samples]
        assert _features(conversations, samples) == expected
    assert _features(conversations, [None, None]) == [None, None]
    assert _features(conversations, []) == []


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "a.png").write_bytes(_image(9))
    (tmp_path / "text.png").write_bytes(b"hello")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_urls_are_fetched_where_images_are_decoded(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    source = _ListSource([_row(f"{address}/{name}.png") for name in ("a", "a", "gone", "text")])
    conversations = _conversations(source, turns=[(0, 1), (2,), (3,)])
    rows = conversations.read(range(3))
    assert [row["images"] for row in rows] == [[None]] * 3
    assert [row["error"] for row in rows] == [None] * 3
    fetched, gone, text = _features(conversations, range(3))
    assert [image.tobytes() for image in fetched["images"]] == [decode_image(_image(9)).tobytes()]
    assert [part["type"] for part in fetched["messages"][0]["content"]] == ["image", "text"]
    assert gone["error"] == f"HTTP 404 for {address}/gone.png"
    assert "cannot identify image" in text["error"]
