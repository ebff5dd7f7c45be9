"""Text can be shown as soon as no later token changes it, and not before."""

from __future__ import annotations

import random

import pytest
from transformers import AutoTokenizer

from vlmray.engines.answers import AnswerText
from vlmray.small_models import BUILTIN_FOLDER

TEXTS = ["the red bar", "9, 17, 23", "grün und 東京 🙂🙂 é", "a\n\nb  c", "\ufffd"]


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return AutoTokenizer.from_pretrained(BUILTIN_FOLDER)


@pytest.mark.parametrize("text", TEXTS)
def test_settled_text_grows_to_the_text_and_takes_nothing_back(tokenizer: object, text: str) -> None:
    answer, shown = AnswerText(tokenizer, ["bars", "23!"]), ""
    for token_id in tokenizer.encode(text):  # type: ignore[attr-defined]
        answer.push(token_id)
        assert answer.settled.startswith(shown)
        assert answer.text.startswith(answer.settled)
        shown = answer.settled
    assert answer.text == text
    assert not answer.stopped


def test_the_first_stop_text_ends_the_answer_wherever_tokens_are_cut(tokenizer: object) -> None:
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices("ab c", k=30))
        stops = ["".join(rng.choices("ab c", k=rng.randint(0, 4))) for _ in range(2)]
        expected = min((text.partition(stop)[0] for stop in stops if stop), key=len, default=text)
        answer, shown = AnswerText(tokenizer, stops), ""
        for token_id in tokenizer.encode(text):  # type: ignore[attr-defined]
            answer.push(token_id)
            assert answer.settled.startswith(shown)
            assert expected.startswith(answer.settled)
            shown = answer.settled
            if answer.stopped:
                break
        assert answer.text == expected, (text, stops)
        assert answer.stopped == (expected != text or any(stop and text.endswith(stop) for stop in stops))
