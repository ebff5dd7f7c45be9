"""How likely the tokens of an answer were, in the terms of those who ask.

ids and numbers of a model -> TokenTexts.describe -> TokenLogprob
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlmray.schema import TokenLogprob

_MOST_TEXTS = 65_536
_INCOMPLETE = "\ufffd"  # what a decoder writes for a part of a character
_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Return the bytes that byte-level tokenizers write as characters: those not printable from 256 on."""
    others = [byte for byte in range(256) if byte not in _PRINTABLE]
    return {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def to_json(tokens: Sequence[TokenLogprob]) -> str:
    """Write log-probabilities as a text that travels; those of minus infinity are JSON of Python's."""
    return json.dumps([_fields(token) for token in tokens], ensure_ascii=False)


def from_json(text: str) -> tuple[TokenLogprob, ...]:
    """Read what `to_json` wrote."""
    return tuple(map(_read, json.loads(text)))


def _fields(token: TokenLogprob) -> dict[str, Any]:
    data = None if token.data is None else list(token.data)
    return {
        "token": token.token,
        "bytes": data,
        "logprob": token.logprob,
        "top": list(map(_fields, token.top)),
    }


def _read(found: Mapping[str, Any]) -> TokenLogprob:
    data = found["bytes"]
    return TokenLogprob(
        token=found["token"],
        data=None if data is None else bytes(data),
        logprob=found["logprob"],
        top=tuple(map(_read, found["top"])),
    )


class TokenTexts:
    """Says what single tokens add to a text.

    Args:
        tokenizer: The model's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._find = functools.lru_cache(_MOST_TEXTS)(self._find_anew)

    def describe(self, token_id: int, logprob: float, top: Sequence[tuple[int, float]] = ()) -> TokenLogprob:
        """Put a token, and the likeliest in its place, in words."""
        token, data = self._find(token_id)
        others = tuple(self.describe(*pair) for pair in top)
        return TokenLogprob(token=token, data=data, logprob=logprob, top=others)

    def _find_anew(self, token_id: int) -> tuple[str, bytes | None]:
        """Return a token as a text and as bytes."""
        if token_id in self._special:
            return self._decode([token_id]), None
        text = self._decode([*self._before, token_id])[len(self._decode(self._before)) :]
        data = self._part_of_character(token_id) if _INCOMPLETE in text else None
        return text, text.encode() if data is None else data

    def _part_of_character(self, token_id: int) -> bytes | None:
        """Return the bytes of a token that is no whole text; None where its tokenizer does not tell."""
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if byte := _BYTE.fullmatch(piece or ""):
            return bytes.fromhex(byte[1])
        if not piece or not all(character in _BYTES for character in piece):
            return None
        return bytes(_BYTES[character] for character in piece)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    @functools.cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self._tokenizer.all_special_ids)

    @functools.cached_property
    def _before(self) -> list[int]:
        """A token to put before others: the first of a text loses its space."""
        return list(self._tokenizer.encode("a", add_special_tokens=False))[-1:]
