"""The text of an answer while its tokens come: what can be shown already, and where it stops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what a decoder writes for the first bytes of a character


class AnswerText:
    """One answer in the making.

    Args:
        tokenizer: Decodes the tokens.
        stop: The answer ends before the first of these texts that it comes to; empty ones are ignored.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.num_tokens = 0
        self.stopped = False
        """Whether one of the stop texts came."""
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._token_ids: list[int] = []

    def push(self, token_id: int) -> None:
        """Add the next token; end tokens are not text and do not belong here."""
        self._token_ids.append(token_id)
        self.num_tokens += 1
        self.text = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
        places = [place for text in self._stop if (place := self.text.find(text)) >= 0]
        if places:
            self.text = self.text[: min(places)]
            self.stopped = True

    @property
    def settled(self) -> str:
        """The part that no later token changes: whole characters, and no beginning of a stop text."""
        if self.stopped:
            return self.text
        text = self.text.rstrip(_INCOMPLETE)
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text begin a stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
