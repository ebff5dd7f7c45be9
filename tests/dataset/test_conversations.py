"""Rows that bring a conversation, in the forms that tools write: read alike, or refused in one line."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from helpers.datasets import png
from vlmray.config import QuestionsConfig
from vlmray.dataset.chat.conversations import is_conversation, read_conversation
from vlmray.dataset.images import stamp_images
from vlmray.dataset.prompts import format_data
from vlmray.dataset.rows import read_rows, to_question
from vlmray.dataset.selection import Selection, describe_columns, open_selection
from vlmray.errors import OptionError

URI = f"data:image/png;base64,{base64.b64encode(png(3)).decode()}"

TURNS = [("user", "<image>\nWhy?"), ("assistant", "So."), ("user", "Like <image>?"), ("assistant", "Yes.")]


def _open(folder: Path, *rows: dict[str, Any], **options: Any) -> Selection:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(number))
    return open_selection(QuestionsConfig(dataset_name=str(path), **options), "test", "[:]")


def _read(selection: Selection) -> list[Any]:
    return read_rows(selection.source, selection.spec, "test", selection.selected)


def _shown(message: dict[str, Any]) -> list[str]:
    return [part.get("text", part["type"]) for part in message["content"]]


def _parts(*parts: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]


def _messages(*contents: Any) -> list[dict[str, Any]]:
    return [
        {"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)
    ]


PLACE = {"type": "image"}
IMAGES = ["0.png", "1.png"]
FORMS = {
    "LLaVA": {
        "id": "1", "image": IMAGES,
        "conversations": [{"from": {"user": "human", "assistant": "gpt"}[r], "value": t} for r, t in TURNS],
    },
    "ShareGPT": {
        "system": "", "images": IMAGES, "tools": "",
        "conversations": [{"from": {"user": "human", "assistant": "gpt"}[r], "value": t} for r, t in TURNS],
    },
    "LLaMA-Factory": {"images": IMAGES, "messages": [{"role": r, "content": t} for r, t in TURNS]},
    "ms-swift": {
        "images": [{"bytes": None, "path": name} for name in IMAGES],
        "conversation": [
            {"human": TURNS[0][1], "assistant": "So."}, {"human": TURNS[2][1], "assistant": "Yes."}
        ],
    },
    "TRL": {
        "images": IMAGES,
        "messages": _messages(
            _parts(PLACE, "Why?"), _parts("So."), _parts("Like ", PLACE, "?"), _parts("Yes.")
        ),
    },
    "TRL's completions": {
        "images": IMAGES,
        "prompt": _messages(_parts(PLACE, "Why?"), "So.", _parts("Like ", PLACE, "?")),
        "completion": [{"role": "assistant", "content": "Yes."}],
    },
    "OpenAI": {
        "messages": _messages(
            _parts({"type": "image_url", "image_url": {"url": "0.png", "detail": "low"}}, "Why?"), "So.",
            _parts("Like ", {"type": "image_url", "image_url": {"url": "1.png"}}, "?"), "Yes.",
        )
    },
    "transformers": {
        "messages": _messages(
            _parts({"type": "image", "path": "0.png", "text": None}, "Why?"), "So.",
            _parts("Like ", {"type": "image", "image": "1.png"}, "?"), "Yes.",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_are_read_alike(form: str, tmp_path: Path) -> None:
    selection = _open(tmp_path, FORMS[form])
    (row,) = _read(selection)
    assert (row["error"], row["question"], row["answers"]) == (None, "Like ?", ["Yes."])
    assert row["images"] == [png(0), png(1)]
    messages = format_data(to_question(row), with_answer=True)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert list(map(_shown, messages)) == [["image", "Why?"], ["So."], ["Like ", "image", "?"], ["Yes."]]
    line = describe_columns(selection.source, selection.spec)
    assert f"conversation from '{selection.spec.question_column}'" in line
    assert len(stamp_images(selection.source, selection.spec, [0])[0].split(",")) == 2


def test_a_system_prompt_is_the_rows_own_or_the_options(tmp_path: Path) -> None:
    ask = {"role": "user", "content": "Why?"}
    rows = [
        {"messages": [{"role": "system", "content": "A"}, ask], "system": None},
        {"messages": [ask], "system": "B"},
        {"messages": [ask], "system": None},
        {"messages": [{"role": "developer", "content": "C"}, ask], "system": "D"},
    ]
    found = [format_data(to_question(row), system_prompt="option") for row in _read(_open(tmp_path, *rows))]
    assert [_shown(messages[0])[0] for messages in found] == ["A", "B", "option", "C"]
    assert all(len(messages) == 2 for messages in found)
    without = _open(tmp_path, *rows, system_column="system").spec
    assert (without.system_column, without.form) == ("system", "conversation")
    with pytest.raises(OptionError, match="--system_column is for rows that bring a conversation"):
        _open(tmp_path, {"question": "Why?", "tone": "A"}, system_column="tone")


def test_images_without_a_place_come_before_the_first_question() -> None:
    messages, images = read_conversation(_messages("Why?", "So.", "How?"), ["a", "b"], system="Be brief.")
    assert list(map(_shown, messages)) == [["Be brief."], ["image", "image", "Why?"], ["So."], ["How?"]]
    assert images == ["a", "b"]


def test_data_uris_and_typed_images_are_taken_where_they_stand(tmp_path: Path) -> None:
    uri = {"type": "image_url", "image_url": {"url": URI}}
    (row,) = _read(
        _open(tmp_path, {"images": ["0.png"], "messages": _messages(_parts(uri, PLACE, "Which?"))})
    )
    assert row["images"] == [png(3), png(0)]
    typed = {"type": "image", "image": {"bytes": png(1), "path": None}, "text": None}
    assert read_conversation(_messages([typed])).images == [png(1)]
    empty = {"type": "image", "image": {"bytes": None, "path": None}, "text": None}
    assert read_conversation(_messages([empty, typed]), ["0.png"]).images == ["0.png", png(1)]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"images": ["0.png"], "messages": _messages("<image><image> Why?")},
         "the text has 2 places for images, and the row has 1 image"),
        ({"images": [], "messages": _messages("<image> Why?")},
         "the text has 1 place for an image, and the row has 0 images"),
        ({"images": IMAGES, "messages": _messages(_parts(PLACE, "Why?"))},
         "the text has 1 place for an image, and the row has 2 images"),
        ({"images": [], "messages": _messages("Why?", _parts(PLACE))},
         "a turn of role assistant holds an image; only those of the user may"),
        ({"images": [], "messages": _messages(_parts({"type": "video", "video": "a.mp4"}, "Why?"))},
         "the row has a video, and video is not supported; give its frames as images"),
        ({"images": ["0.png"], "videos": ["a.mp4"], "messages": _messages("<image> <video> Why?")},
         "the row has a video, and video is not supported; give its frames as images"),
        ({"images": [], "messages": _messages(_parts({"type": "input_audio", "input_audio": {}}))},
         "a turn has a part of type 'input_audio'; expected text or image"),
        ({"images": [], "messages": [{"role": "tool", "content": "7"}]},
         "the conversation has a turn of role 'tool'; system, user and assistant are supported"),
        ({"images": [], "messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
         "the conversation has a turn with tool_calls; system, user and assistant are supported"),
        ({"images": [], "messages": [{"role": "assistant", "content": "So."}]},
         "the conversation asks nothing: its last answer aside, it has no turn before it"),
        ({"images": [], "messages": _messages("Why?", "a")[:1] + _messages("", "a", "")[1:2] * 2},
         "the conversation asks nothing: its last answer aside, it ends with a turn of role assistant"),
        ({"images": [], "messages": _messages(_parts({"type": "image", "image": 5}))},
         "expected an image or the name of one, got str"),
    ],
)  # fmt: skip
def test_what_is_not_understood_fails_its_row(row: dict[str, Any], error: str, tmp_path: Path) -> None:
    good = {"images": ["0.png"], "messages": _messages("<image> Why?", "So.")}
    found = _read(_open(tmp_path, good, row, good))
    assert [each["error"] for each in found[::2]] == [None, None]
    if "got str" in error:  # a number of JSON is a text, here the name of a file
        assert found[1]["error"].startswith("no such file")
    else:
        assert found[1]["error"] == error


def test_a_text_may_speak_of_video_marks(tmp_path: Path) -> None:
    (row,) = _read(_open(tmp_path, {"images": [], "messages": _messages("What does <video> do in HTML?")}))
    assert (row["error"], row["question"]) == (None, "What does <video> do in HTML?")


def test_a_row_of_a_video_is_refused(tmp_path: Path) -> None:
    rows = [{"video": "a.mp4", "question": "Why?"}, {"video": None, "question": "Why?"}]
    found = _read(_open(tmp_path, *rows))
    assert [row["error"] for row in found] == [
        "the row has a video, and video is not supported; give its frames as images", None
    ]  # fmt: skip


def test_text_only_rows_stand_between_others(tmp_path: Path) -> None:
    rows = [FORMS["LLaVA"], {"id": "2", "conversations": FORMS["ms-swift"]["conversation"], "image": IMAGES}]
    rows.insert(1, {"id": "3", "conversations": [{"from": "human", "value": "Why?"}]})
    found = _read(_open(tmp_path, *rows))
    assert [row["error"] for row in found] == [None] * 3
    assert [len(row["images"]) for row in found] == [2, 0, 2]


def test_options_about_questions_are_refused(tmp_path: Path) -> None:
    row = FORMS["LLaVA"]
    with pytest.raises(OptionError, match="--prompt_template is for questions, and 'conversations' holds"):
        _open(tmp_path, row, prompt_template="{question}!")
    question = _open(tmp_path, {**row, "question": "Why?"}).spec
    assert (question.question_column, question.form) == ("question", None)
    chosen = _open(tmp_path, {**row, "question": "Why?"}, question_column="conversations").spec
    assert (chosen.question_column, chosen.form) == ("conversations", "conversation")


def test_only_conversations_are_preferred_to_a_prompt(tmp_path: Path) -> None:
    turns = _messages("Why?", "So.")
    for messages, column in (("12", "prompt"), ([], "prompt"), (turns, "messages")):
        spec = _open(tmp_path, {"messages": messages, "prompt": "Why?"}).spec
        assert (spec.question_column, spec.form) == (column, "conversation" if messages is turns else None)


@pytest.mark.parametrize("value", [None, [], "Why?", ["Why?"], [{}], [{"text": "Why?"}], {"role": "user"}])
def test_other_values_are_no_conversations(value: Any) -> None:
    assert not is_conversation(value)
