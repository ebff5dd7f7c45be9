"""Several answers of each row: asked for by requests of their own, and one again by a vote.

request -> draws_of -> as many requests -> engine -> completions -> by_row -> settle -> what a row gets
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from vlmray.metrics.draws import majority
from vlmray.schema import Completion, GenerationRequest, Row

T = TypeVar("T")


def draws_of(request: GenerationRequest, number: int) -> list[GenerationRequest]:
    """Return a request as often as it is to be answered: itself first, then others that differ in their ids.

    Engines sample by seed and id, so the first draw is that of a run that draws no more.
    """
    others = range(1, number)
    name = request.request_id
    return [request, *(dataclasses.replace(request, request_id=f"{name}#{place}") for place in others)]


def by_row(values: Iterable[T], number: int) -> Iterator[tuple[T, ...]]:
    """Take together what belongs to a row, so many values each.

    Raises:
        ValueError: The last row has fewer.
    """
    return zip(*[iter(values)] * number, strict=True)


class RowsInFlight:
    """Rows that are asked about one request at a time, whose completions come in any order.

    Args:
        number: Requests of each row.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._num_begun = 0
        self._rows: dict[int, tuple[Row, dict[int, Completion]]] = {}

    def begin(self, row: Row) -> None:
        """Take a row whose requests are the next."""
        self._rows[self._num_begun] = row, {}
        self._num_begun += 1

    def end(self, index: int, completion: Completion) -> tuple[Row, list[Completion]] | None:
        """Take a completion by the place of its request; return its row, once that has all, with them."""
        number, draw = divmod(index, self._number)
        row, drawn = self._rows[number]
        drawn[draw] = completion
        if len(drawn) < self._number:
            return None
        del self._rows[number]  # its image is needed no more
        return row, [drawn[draw] for draw in range(self._number)]


def settle(drawn: Sequence[Completion]) -> tuple[Completion, Row]:
    """Return the completion that counts for a row, and the columns that it has of all draws.

    That is the first of those that say what most do, and has the tokens of all; or one that failed.
    """
    failed = next((each for each in drawn if each.error is not None), None)
    if failed is not None or len(drawn) == 1:
        return failed or drawn[0], {}
    texts = [each.text for each in drawn]
    place, agreement = majority(texts)
    chosen = dataclasses.replace(
        drawn[place],
        num_completion_tokens=sum(each.num_completion_tokens for each in drawn),
        num_cached_tokens=drawn[0].num_cached_tokens,  # of the prompt, before there was any answer to it
    )
    return chosen, {"samples": texts, "agreement": agreement}
