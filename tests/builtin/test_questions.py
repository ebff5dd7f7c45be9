"""The answers of the built-in charts follow from what the chart shows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from helpers.charts import dataset, extreme
from vlmray.builtin.drawing import draw_chart
from vlmray.builtin.questions import QUESTIONS

Table = list[tuple[str, str, int]]  # label, colour, value of each mark, in reading order
MARK = "(?:bar|point|slice)"
COLOUR = f"(?:the )?(\\w+) {MARK}"


LARGEST, SMALLEST = "tallest|longest|highest|largest", "shortest|lowest|smallest"


def named(table: Table, name: str) -> tuple[str, str, int]:
    """Find the mark that a question means by 'the red bar' or by 'Ann'."""
    colour = re.fullmatch(COLOUR, name)
    (mark,) = [row for row in table if (row[1] == colour[1] if colour else row[0] == name)]
    return mark


def neighbour(table: Table, colour: str) -> str:
    order = [row[1] for row in table]
    return order[(order.index(colour) + 1) % len(order)]


def listing(table: Table, what: str, first: str | None) -> str:
    """List a column of the table, from a colour on where marks go round."""
    start = [row[1] for row in table].index(first) if first else 0
    column = ("labels", "colours", "values").index(what)
    return ", ".join(str(row[column]) for row in table[start:] + table[:start])


# Family, pattern of the question, and how to answer it from the table `t`.
READERS: list[tuple[str, str, Callable[..., object]]] = [
    ("count", f"How many {MARK}s are there", lambda t: len(t)),
    ("count_above", f"How many {MARK}s are above (\\d+)(?: percent)?",
     lambda t, n: sum(r[2] > int(n) for r in t)),
    ("position", f"What colour is the (leftmost|rightmost|top|bottom) {MARK}",
     lambda t, end: t[0 if end in ("leftmost", "top") else -1][1]),
    ("position", f"What colour is the {MARK} just (?:right of|below|clockwise from) (\\w+)", neighbour),
    ("naming", f"Which label has (the \\w+ {MARK})", lambda t, a: named(t, a)[0]),
    ("naming", f"What colour is the {MARK} of (\\w+)", lambda t, a: named(t, a)[1]),
    ("extreme", f"What colour is the ({LARGEST}|{SMALLEST}) {MARK}", lambda t, a: extreme(t, a)[1]),
    ("extreme", f"Which label has the ({LARGEST}|{SMALLEST}) {MARK}", lambda t, a: extreme(t, a)[0]),
    ("highest", "What is the (highest) (?:value|percent)", lambda t, a: extreme(t, a)[2]),
    ("lowest", "What is the (lowest) (?:value|percent)", lambda t, a: extreme(t, a)[2]),
    ("value_by_colour", f"What (?:is the value of|percent is) (the \\w+ {MARK})",
     lambda t, a: named(t, a)[2]),
    ("value_by_label", "What (?:is the value of|percent is) (\\w+)", lambda t, a: named(t, a)[2]),
    ("comparison", "Is (.+) larger than (.+)",
     lambda t, a, b: "yes" if named(t, a)[2] > named(t, b)[2] else "no"),
    ("list", f"List the (\\w+) of the {MARK}s "
     "(?:from left to right|from top to bottom|clockwise from (\\w+))", listing),
    ("difference", "What is the difference between (.+) and (.+)",
     lambda t, a, b: max(named(t, a)[2], named(t, b)[2]) - min(named(t, a)[2], named(t, b)[2])),
    ("record", f"Describe (the \\w+ {MARK}) as JSON with the keys label, colour and value",
     lambda t, a: json.dumps(dict(zip(("label", "colour", "value"), named(t, a), strict=True)))),
]  # fmt: skip


def test_every_answer_follows_from_the_chart() -> None:
    families = ",".join(QUESTIONS)
    view, used = dataset(f"charts?num_rows=650&seed=3&family={families}"), set()
    for index, row in enumerate(view):
        chart = view.chart(index)
        table = list(zip(chart.labels, chart.colours, chart.values, strict=True))
        readings = [
            (number, str(read(table, *match.groups())))
            for number, (family, pattern, read) in enumerate(READERS)
            if family == row["family"] and (match := re.fullmatch(pattern + "[?.]", row["question"]))
        ]
        assert [answer for _, answer in readings] == row["answers"], row["question"]
        used.add(readings[0][0])
    assert used == set(range(len(READERS)))


def test_values_are_distinct_and_readable() -> None:
    view = dataset()
    for index in range(0, 1000, 2):
        chart = view.chart(index)
        assert (
            len(set(chart.values)) == len(set(chart.labels)) == len(set(chart.colours)) == len(chart.values)
        )
        if chart.kind == "pie":
            assert sum(chart.values) == 100
        else:
            assert min(chart.values) > 0
            assert max(chart.values) <= chart.scale.top
            assert all(value % chart.scale.step == 0 for value in chart.values)


def test_values_are_printed_or_can_be_read_off_the_axis() -> None:
    view = dataset("charts?questions_per_image=1")
    for index in range(200):
        chart = view.chart(index)
        printed = {number for item in draw_chart(chart).texts for number in re.findall("\\d+", item.text)}
        if chart.kind == "pie" or chart.style.print_values:
            assert printed >= set(map(str, chart.values))
        else:
            assert chart.style.grid
            assert printed >= set(map(str, range(0, chart.scale.top + 1, chart.scale.tick)))
            assert chart.scale.top // chart.scale.step == 10
