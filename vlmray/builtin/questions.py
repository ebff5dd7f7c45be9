"""Questions about a chart, by family, with the answers that its data gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import combinations, pairwise, permutations
from typing import NamedTuple

from vlmray.builtin.canvas import Chart, Kind

# ---------------------------------------------------------------------------------------------
# Questions: a family is one function from a chart to every question of that family it permits
# ---------------------------------------------------------------------------------------------


class Question(NamedTuple):
    """A question and its only answer."""

    text: str
    answer: str


class Words(NamedTuple):
    """How questions speak about one kind of chart."""

    mark: str
    largest: str
    smallest: str
    after: str
    """Where the next mark in reading order lies."""

    ends: tuple[str, str] | None
    """Names of the first and the last mark; None where the marks go round."""

    order: str
    """How all marks are listed; `{first}` is the colour of the one that begins."""

    value_of: str = "What is the value of"
    value: str = "value"
    unit: str = ""


_ACROSS = "from left to right"
WORDS: dict[Kind, Words] = {
    "bar": Words("bar", "tallest", "shortest", "right of", ("leftmost", "rightmost"), _ACROSS),
    "hbar": Words("bar", "longest", "shortest", "below", ("top", "bottom"), "from top to bottom"),
    "line": Words("point", "highest", "lowest", "right of", ("leftmost", "rightmost"), _ACROSS),
    "pie": Words(
        "slice", "largest", "smallest", "clockwise from", None, "clockwise from {first}",
        "What percent is", "percent", " percent",
    ),
}  # fmt: skip


def _namings(chart: Chart) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the two ways to name every mark: by its colour and by its label."""
    mark = WORDS[chart.kind].mark
    return tuple(f"the {colour} {mark}" for colour in chart.colours), chart.labels


def _count(chart: Chart) -> Iterator[Question]:
    yield Question(f"How many {WORDS[chart.kind].mark}s are there?", str(len(chart.values)))


def _count_above(chart: Chart) -> Iterator[Question]:
    words, scale = WORDS[chart.kind], chart.scale
    # A mark exactly at the threshold is hard to judge by eye, so thresholds avoid all values.
    free = [value for value in range(scale.step, scale.top, scale.step) if value not in chart.values]
    telling = [value for value in free if min(chart.values) < value < max(chart.values)]
    for threshold in telling or free:
        number = sum(value > threshold for value in chart.values)
        yield Question(f"How many {words.mark}s are above {threshold}{words.unit}?", str(number))


def _position(chart: Chart) -> Iterator[Question]:
    words, colours = WORDS[chart.kind], chart.colours
    following = list(pairwise(colours))
    if words.ends:
        yield Question(f"What colour is the {words.ends[0]} {words.mark}?", colours[0])
        yield Question(f"What colour is the {words.ends[1]} {words.mark}?", colours[-1])
    else:
        following.append((colours[-1], colours[0]))
    for colour, answer in following:
        yield Question(f"What colour is the {words.mark} just {words.after} {colour}?", answer)


def _naming(chart: Chart) -> Iterator[Question]:
    mark = WORDS[chart.kind].mark
    for colour, label in zip(chart.colours, chart.labels, strict=True):
        yield Question(f"Which label has the {colour} {mark}?", label)
        yield Question(f"What colour is the {mark} of {label}?", colour)


def _extreme(chart: Chart) -> Iterator[Question]:
    words = WORDS[chart.kind]
    for adjective, value in ((words.largest, max(chart.values)), (words.smallest, min(chart.values))):
        index = chart.values.index(value)
        yield Question(f"What colour is the {adjective} {words.mark}?", chart.colours[index])
        yield Question(f"Which label has the {adjective} {words.mark}?", chart.labels[index])


def _highest(chart: Chart) -> Iterator[Question]:
    yield Question(f"What is the highest {WORDS[chart.kind].value}?", str(max(chart.values)))


def _lowest(chart: Chart) -> Iterator[Question]:
    yield Question(f"What is the lowest {WORDS[chart.kind].value}?", str(min(chart.values)))


def _values_of(chart: Chart, names: tuple[str, ...]) -> Iterator[Question]:
    for name, value in zip(names, chart.values, strict=True):
        yield Question(f"{WORDS[chart.kind].value_of} {name}?", str(value))


def _value_by_colour(chart: Chart) -> Iterator[Question]:
    return _values_of(chart, _namings(chart)[0])


def _value_by_label(chart: Chart) -> Iterator[Question]:
    return _values_of(chart, _namings(chart)[1])


def _comparison(chart: Chart) -> Iterator[Question]:
    for names in _namings(chart):
        # Both orders of every pair, so that yes and no are equally common.
        for (one, value), (other, other_value) in permutations(zip(names, chart.values, strict=True), 2):
            yield Question(f"Is {one} larger than {other}?", "yes" if value > other_value else "no")


def _difference(chart: Chart) -> Iterator[Question]:
    for names in _namings(chart):
        for (one, value), (other, other_value) in combinations(zip(names, chart.values, strict=True), 2):
            yield Question(
                f"What is the difference between {one} and {other}?", str(abs(value - other_value))
            )


def _list(chart: Chart) -> Iterator[Question]:
    words = WORDS[chart.kind]
    # Where marks go round any of them can begin; elsewhere the first one does.
    for start in range(1 if words.ends else len(chart.values)):
        order = words.order.format(first=chart.colours[start])
        for name, listed in (
            ("colours", chart.colours), ("labels", chart.labels), ("values", chart.values)
        ):  # fmt: skip
            answer = ", ".join(map(str, listed[start:] + listed[:start]))
            yield Question(f"List the {name} of the {words.mark}s {order}.", answer)


def _record(chart: Chart) -> Iterator[Question]:
    mark = WORDS[chart.kind].mark
    for label, colour, value in zip(chart.labels, chart.colours, chart.values, strict=True):
        answer = json.dumps({"label": label, "colour": colour, "value": value})
        yield Question(f"Describe the {colour} {mark} as JSON with the keys label, colour and value.", answer)


QUESTIONS: dict[str, Callable[[Chart], Iterator[Question]]] = {
    "count": _count,
    "count_above": _count_above,
    "position": _position,
    "naming": _naming,
    "extreme": _extreme,
    "highest": _highest,
    "lowest": _lowest,
    "value_by_colour": _value_by_colour,
    "value_by_label": _value_by_label,
    "comparison": _comparison,
    "difference": _difference,
    "list": _list,
    "record": _record,
}

BY_NAME = ("record",)
"""Families that are asked only where they are named: their answers are of another form."""

FAMILIES: tuple[str, ...] = tuple(name for name in QUESTIONS if name not in BY_NAME)
"""Names of the others, which are asked unless some are named."""
