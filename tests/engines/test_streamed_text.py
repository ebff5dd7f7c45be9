"""Text can be shown as soon as no later token changes it, and not before."""

from __future__ import annotations

import random

import pytest
from transformers import AutoTokenizer

from vlmray.builtin.models import BUILTIN_FOLDER
from vlmray.engines.streamed_text import Answer

TEXTS = ["the red bar", "9, 17, 23", "grün und 東京 🙂🙂 é", "a\n\nb  c", "\ufffd"]


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return AutoTokenizer.from_pretrained(BUILTIN_FOLDER)


@pytest.mark.parametrize("text", TEXTS)
def test_settled_text_grows_to_the_text_and_takes_nothing_back(tokenizer: object, text: str) -> None:
    answer, shown = Answer(tokenizer, 99, stop=["bars", "23!"]), ""
    for token_id in tokenizer.encode(text):  # type: ignore[attr-defined]
        answer.push(token_id)
        assert answer.settled.startswith(shown)
        assert answer.text.startswith(answer.settled)
        shown = answer.settled
    assert answer.text == text
    assert answer.finish_reason is None


def test_the_first_stop_text_ends_the_answer_wherever_tokens_are_cut(tokenizer: object) -> None:
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices("ab c", k=30))
        stops = ["".join(rng.choices("ab c", k=rng.randint(0, 4))) for _ in range(2)]
        expected = min((text.partition(stop)[0] for stop in stops if stop), key=len, default=text)
        answer, shown = Answer(tokenizer, 99, stop=stops), ""
        for token_id in tokenizer.encode(text):  # type: ignore[attr-defined]
            ended = answer.push(token_id)
            assert answer.settled.startswith(shown)
            assert expected.startswith(answer.settled)
            shown = answer.settled
            if ended:
                break
        assert answer.text == expected, (text, stops)
        assert (answer.finish_reason == "stop") == (
            expected != text or any(stop and text.endswith(stop) for stop in stops)
        )


def test_limit_and_end_token_end_the_answer(tokenizer: object) -> None:
    first, second, third = tokenizer.encode("123")  # type: ignore[attr-defined]
    answer = Answer(tokenizer, 2, end_ids={third})
    assert [answer.push(token_id) for token_id in (first, second)] == [False, True]
    assert (answer.text, answer.num_tokens, answer.finish_reason) == ("12", 2, "length")
    answer = Answer(tokenizer, 2, end_ids={third})
    assert [answer.push(token_id) for token_id in (first, third)] == [False, True]
    assert (answer.text, answer.num_tokens, answer.finish_reason) == ("1", 2, "stop")
