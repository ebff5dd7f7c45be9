"""Prompts: content is always parts, templates fill without surprises, choices get letters."""

from __future__ import annotations

from typing import Any

import pytest

from vlmray.dataset.prompts import check_prompt_template, format_choices, format_data, format_qwen_vl_messages
from vlmray.schema import Sample


def _sample(**fields: Any) -> Sample:
    return Sample(
        **{"sample_id": "test-000001", "question": "How many?", "answers": ("3", "three"), **fields}
    )


def _user_text(messages: list[dict[str, Any]]) -> str:
    (user,) = [message for message in messages if message["role"] == "user"]
    return user["content"][-1]["text"]


def test_images_come_before_the_question() -> None:
    (message,) = format_qwen_vl_messages("Which?", 2)
    assert message["role"] == "user"
    assert message["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]


@pytest.mark.parametrize(("images", "count"), [(0, 0), (3, 3), ([], 0), ([b"a", b"b"], 2), (("x.png",), 1)])
def test_images_are_a_number_or_a_sequence(images: Any, count: int) -> None:
    (message,) = format_qwen_vl_messages("Which?", images)
    assert [part["type"] for part in message["content"]] == ["image"] * count + ["text"]


@pytest.mark.parametrize("images", ["chart.png", b"\xff\xd8"])
def test_one_encoded_image_is_not_a_sequence_of_images(images: Any) -> None:
    with pytest.raises(ValueError, match="pass a list of images"):
        format_qwen_vl_messages("Which?", images)


def test_negative_number_of_images() -> None:
    with pytest.raises(ValueError, match="at least 0, got -1"):
        format_qwen_vl_messages("Which?", -1)


@pytest.mark.parametrize("system_prompt", ["Be brief.", ""])
def test_content_is_a_list_of_parts_in_every_turn(system_prompt: str) -> None:
    messages = format_data(_sample(images=(b"png",)), system_prompt=system_prompt, with_answer=True)
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert all(isinstance(message["content"], list) for message in messages)
    assert messages[0]["content"] == [{"type": "text", "text": system_prompt}]
    assert messages[2]["content"] == [{"type": "text", "text": "3"}]


def test_no_system_prompt_and_no_answer_by_default() -> None:
    assert [message["role"] for message in format_data(_sample())] == ["user"]


def test_messages_share_nothing() -> None:
    first, second = format_data(_sample(images=(b"png",))), format_data(_sample(images=(b"png",)))
    first[0]["content"].append("changed")
    assert first != second


@pytest.mark.parametrize(
    ("image", "types"), [(None, ["text"]), (b"", ["image", "text"]), ("a.png", ["image", "text"])]
)
def test_a_sample_has_one_image_or_none(image: Any, types: list[str]) -> None:
    (message,) = format_data(_sample(images=() if image is None else (image,)))
    assert [part["type"] for part in message["content"]] == types


@pytest.mark.parametrize("question", ["", "  \n"])
def test_empty_question(question: str) -> None:
    with pytest.raises(ValueError, match="empty question"):
        format_qwen_vl_messages(question)
    with pytest.raises(ValueError, match="empty question"):
        format_data(_sample(question=question), prompt_template="Look. {question}")


@pytest.mark.parametrize(
    "question", ["What is {x}?", "{question}", "{choices}", "{}", r"\1 \g<0> {{", "100 %s"]
)
def test_braces_and_escapes_in_questions_are_plain_text(question: str) -> None:
    template = "Q: {question}\n{choices}\nA:"
    text = _user_text(
        format_data(_sample(question=question, choices=("{question}", "b")), prompt_template=template)
    )
    assert text == f"Q: {question}\nA. {{question}}\nB. b\nA:"


def test_choices_follow_the_question_unless_the_template_places_them() -> None:
    sample = _sample(choices=("red", "blue"))
    assert _user_text(format_data(sample)) == "How many?\nA. red\nB. blue"
    suffixed = format_data(sample, prompt_template="{question}\nAnswer with a letter.")
    assert _user_text(suffixed) == "How many?\nA. red\nB. blue\nAnswer with a letter."
    placed = format_data(sample, prompt_template="Options:\n{choices}\n{question}")
    assert _user_text(placed) == "Options:\nA. red\nB. blue\nHow many?"


def test_no_choices_leave_no_empty_line() -> None:
    assert (
        _user_text(format_data(_sample(), prompt_template="{question}\n{choices}\nAnswer:"))
        == "How many?\nAnswer:"
    )


def test_more_choices_than_letters() -> None:
    assert format_choices([str(i) for i in range(26)]).endswith("\nZ. 25")
    with pytest.raises(ValueError, match="27 choices, but only 26 letters"):
        format_choices([str(i) for i in range(27)])


def test_training_needs_an_answer() -> None:
    with pytest.raises(ValueError, match="test-000001 has no answer"):
        format_data(_sample(answers=()), with_answer=True)


@pytest.mark.parametrize(
    "template",
    ["{question}", "{question}{choices}", '{question} Reply as {"answer": 1}', "{ x } {} {question}"],
)
def test_valid_templates(template: str) -> None:
    check_prompt_template(template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", r"does not contain \{question\}; it may use \{question\} and \{choices\}"),
        ("Describe {choices}", r"does not contain \{question\}"),
        (
            "{question} {hint} {image} {hint}",
            r"names \{hint\}, \{image\}; it may use \{question\} and \{choices\}",
        ),
    ],
)
def test_invalid_templates(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_prompt_template(template)
    with pytest.raises(ValueError, match=message):
        format_data(_sample(), prompt_template=template)
