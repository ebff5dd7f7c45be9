"""Samples to chat messages: the one shape that every model, engine and collator here reads.

    Sample -> template filled with question and choices -> messages

Content is always a list of parts, the system prompt included: chat templates and image stages that
look for image parts have skipped the images of a whole conversation because one message held a plain
string. Messages hold `{"type": "image"}` placeholders only; the images travel beside them, in order.
"""

from __future__ import annotations

import copy
import re
import string
from collections.abc import Sequence
from typing import Any

from vlmray.dataset.chat.marks import place_images
from vlmray.schema import Sample

PLACEHOLDERS = ("question", "choices")
"""What a prompt template may name in braces."""

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_CHOICES_WITH_LINE_BREAK = re.compile(r"\n?\{choices\}")


def format_qwen_vl_messages(
    question: str, images: int | Sequence[object] = 1, *, system_prompt: str | None = None
) -> list[dict[str, Any]]:
    """Build chat messages that ask `question` about `images`.

    >>> format_qwen_vl_messages("How many bars?")
    [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'How many bars?'}]}]

    Args:
        question: The text of the user turn, after its images.
        images: The number of images, or the images themselves, of which only the count is used.
        system_prompt: Text of a system turn. None writes no such turn, and some chat templates then
            add their own; an empty string writes an empty one, which switches theirs off.

    Raises:
        ValueError: The question is empty, or `images` is negative or one encoded image.
    """
    if not question.strip():
        raise ValueError("empty question")
    content: list[dict[str, Any]] = [{"type": "image"} for _ in range(_count_images(images))]
    content.append({"type": "text", "text": question})
    return [*_system(system_prompt), {"role": "user", "content": content}]


def format_data(
    sample: Sample,
    *,
    system_prompt: str | None = None,
    prompt_template: str = "{question}",
    with_answer: bool = False,
) -> list[dict[str, Any]]:
    r"""Turn a sample into chat messages, with a placeholder for each of its images.

    Placeholders come first, or where the text has marks such as `<image>`. A sample that brings a
    conversation is asked as it stands.

    >>> sample = Sample(sample_id="test-000000", question="Which?", answers=("B",), choices=("red", "blue"))
    >>> messages = format_data(sample, prompt_template="{question}\nAnswer with a letter.", with_answer=True)
    >>> [message["content"][0]["text"] for message in messages]
    ['Which?\nA. red\nB. blue\nAnswer with a letter.', 'B']

    Args:
        sample: The row to ask.
        system_prompt: Text of a system turn, for a sample that brings none; None writes none.
        prompt_template: Text with `{question}` and, where wanted, `{choices}`. Without `{choices}`
            the choices of a sample that has some follow its question.
        with_answer: Add the assistant turn with the first answer, as training needs it.

    Raises:
        ValueError: The question is empty, the template is not valid, the sample has more choices than
            there are letters, other images than marks, or `with_answer` is set and it has no answer.
    """
    if not sample.question.strip() and not (sample.messages and sample.images):
        raise ValueError("empty question")
    messages = copy.deepcopy(list(sample.messages)) or _ask(sample, prompt_template)
    if messages[0]["role"] != "system":
        messages = [*_system(system_prompt), *messages]
    if with_answer:
        if not sample.answers:
            raise ValueError(f"sample {sample.sample_id} has no answer to train on")
        messages.append(_text_message("assistant", sample.answers[0]))
    return messages


def _ask(sample: Sample, prompt_template: str) -> list[dict[str, Any]]:
    content = place_images(_fill_template(prompt_template, sample), len(sample.images))
    return [{"role": "user", "content": content}]


def check_prompt_template(template: str) -> None:
    """Check that a template asks the question and names nothing unknown.

    Braces around anything but a single word, as in an example of JSON, are plain text.

    Raises:
        ValueError: `{question}` is missing, or a placeholder is not one of `PLACEHOLDERS`.
    """
    names = _PLACEHOLDER.findall(template)
    allowed = " and ".join(f"{{{name}}}" for name in PLACEHOLDERS)
    unknown = [f"{{{name}}}" for name in dict.fromkeys(names) if name not in PLACEHOLDERS]
    if unknown:
        raise ValueError(f"prompt template {template!r} names {', '.join(unknown)}; it may use {allowed}")
    if "question" not in names:
        raise ValueError(f"prompt template {template!r} does not contain {{question}}; it may use {allowed}")


def format_choices(choices: Sequence[str]) -> str:
    r"""Write choices as lines with letters.

    >>> format_choices(["red", "blue"])
    'A. red\nB. blue'

    Raises:
        ValueError: There are more choices than letters.
    """
    letters = string.ascii_uppercase
    if len(choices) > len(letters):
        raise ValueError(f"{len(choices)} choices, but only {len(letters)} letters to name them")
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=False))


def _fill_template(template: str, sample: Sample) -> str:
    """Put question and choices into the template in one pass, so braces inside them stay as they are."""
    check_prompt_template(template)
    values = {"question": sample.question, "choices": format_choices(sample.choices)}
    if not sample.choices:
        template = _CHOICES_WITH_LINE_BREAK.sub("", template)
    elif "{choices}" not in template:
        values["question"] += "\n" + values["choices"]
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def _count_images(images: int | Sequence[object]) -> int:
    """Return how many placeholders to write."""
    if isinstance(images, str | bytes):  # A sequence too: its length would be taken for a count.
        raise ValueError("images is one encoded image; pass a list of images or their number")
    count = images if isinstance(images, int) else len(images)
    if count < 0:
        raise ValueError(f"the number of images must be at least 0, got {count}")
    return count


def _system(text: str | None) -> list[dict[str, Any]]:
    return [] if text is None else [_text_message("system", text)]


def _text_message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}
