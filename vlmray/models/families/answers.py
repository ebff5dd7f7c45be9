"""What a chat template makes of an answer: what ends it, and what comes before the next question.

Answers are written behind a prompt as a model would write them and not as a template would: some rewrite
what was said before (thoughts are left out, spaces put in), and would not teach what is asked.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vlmray.models.families.base import Family
from vlmray.models.prompts import ChatPrompts, match_any
from vlmray.schema import text_of

Turns = Sequence[Mapping[str, Any]]

_MARK = "\U0010fffd\U0010fffd"
"""An answer that is found again in what a template writes."""


class Answers:
    """Writes answers for a model.

    Args:
        prompts: Of the model.
        tokenizer: Of the model.
        family: What is known of it.
        end_ids: Tokens that end its answers, by its generation config.
    """

    def __init__(
        self, prompts: ChatPrompts, tokenizer: Any, family: Family, end_ids: Collection[int] = ()
    ) -> None:
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._family = family
        self._ends = {tokenizer.convert_ids_to_tokens(token) for token in end_ids}

    @functools.cached_property
    def end(self) -> str:
        """What follows an answer, up to the token that ends it."""
        if self._family.end_token is not None:
            return self._family.end_token
        found = list(match_any(self._prompts.special_tokens).finditer(self._behind(_MARK)))
        for match in [*(match for match in found if match[0] in self._ends), *found]:
            return self._behind(_MARK)[: match.end()]
        special = sorted(self._ends & self._prompts.special_tokens)
        eos = self._tokenizer.eos_token
        if eos is None and not special:
            raise ValueError(
                "neither the chat template nor the tokenizer has an end token, so the model would not learn "
                "to stop; pass a checkpoint with one"
            )
        return str(eos if eos in special or not special else special[0])

    @functools.cached_property
    def end_token(self) -> str:
        """The last token of `end`; empty where the tokenizer does not know it as a special one."""
        found = match_any(self._prompts.special_tokens).findall(self.end)
        return str(found[-1]) if found else ""

    def write(self, answer: str) -> str:
        """Return an answer as the model shall write it."""
        return (answer.strip() if self._strips else answer) + self.end

    def text_between(self, done: str, prompt: str, turns: Turns) -> str:
        """Return what the template puts between the last answer and the next one.

        Args:
            done: Rendered prompts and written answers so far.
            prompt: What was rendered of the turns.
            turns: Those before the next answer.

        Raises:
            ValueError: The last answer is not in the prompt.
        """
        if prompt.startswith(done):
            return prompt[len(done) :]
        last = max(place for place, turn in enumerate(turns) if turn["role"] == "assistant")
        marked = [*turns[:last], _turn("assistant", _MARK), *turns[last + 1 :]]
        rest = self._prompts.render(marked, add_generation_prompt=True).rpartition(_MARK)[2]
        before = prompt.removesuffix(rest).rstrip()
        if before == prompt.rstrip() or not before.endswith(text_of(turns[last]).strip()):
            raise ValueError(
                f"the chat template does not keep the answer {text_of(turns[last])[:60]!r} when the next "
                "question comes; pass a checkpoint whose template does, or --max_turns 1"
            )
        return rest.removeprefix(self.end)

    @functools.cached_property
    def _strips(self) -> bool:
        """Whether the template takes away the space around an answer."""
        return self._behind(_MARK + " ") == self._behind(_MARK)

    def _behind(self, answer: str) -> str:
        written = self._prompts.render([_turn("user", "?"), _turn("assistant", answer)])
        return written.rpartition(_MARK)[2]


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}
