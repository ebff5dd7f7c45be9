"""An answer while its tokens come: what of it can be shown already, and where it ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

_INCOMPLETE = "\ufffd"  # what a decoder writes for the first bytes of a character


class Answer:
    """One answer in the making.

    Args:
        tokenizer: Decodes the tokens.
        max_new_tokens: The answer ends with this many tokens at the latest.
        end_ids: Tokens that end it; they are counted and are no text.
        stop: The answer ends before the first of these texts that it comes to; empty ones are ignored.
        min_new_tokens: Stop texts are looked for behind the text of so many tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_new_tokens: int,
        end_ids: Collection[int] = (),
        stop: Sequence[str] = (),
        min_new_tokens: int = 0,
    ) -> None:
        self.num_tokens = 0
        self.finish_reason: Literal["stop", "length"] | None = None
        """Why it has ended; None until it has."""
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._end_ids = end_ids
        self._stop = [text for text in stop if text]
        self._min_new_tokens = min_new_tokens
        self._stops_from = 0
        self._token_ids: list[int] = []
        self._text: str | None = ""

    def push(self, token_id: int) -> bool:
        """Add the next token; return whether the answer ends with it."""
        self.num_tokens += 1
        if token_id in self._end_ids:
            self.finish_reason = "stop"
            return True
        self._token_ids.append(token_id)
        self._text = None
        if self._stop and self.num_tokens <= self._min_new_tokens:
            self._stops_from = len(self.text)
        places = [place for stop in self._stop if (place := self.text.find(stop, self._stops_from)) >= 0]
        if places:
            self._text = self.text[: min(places)]
            self.finish_reason = "stop"
        elif self.num_tokens >= self._max_new_tokens:
            self.finish_reason = "length"
        return self.finish_reason is not None

    @property
    def text(self) -> str:
        """All there is; decoded when somebody looks."""
        if self._text is None:
            self._text = str(self._tokenizer.decode(self._token_ids, skip_special_tokens=True))
        return self._text

    @property
    def settled(self) -> str:
        """The part that no later token changes: whole characters, and no beginning of a stop text."""
        if self.finish_reason is not None:
            return self.text
        text = self.text.rstrip(_INCOMPLETE)
        held = max((_overlap(text[self._stops_from :], stop) for stop in self._stop), default=0)
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text begin a stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
