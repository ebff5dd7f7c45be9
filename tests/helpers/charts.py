"""Built-in charts for tests."""

from __future__ import annotations

from collections.abc import Sequence

from vlmray.builtin.charts import ChartDataset, parse_charts_name


def dataset(name: str = "charts", split: str = "train") -> ChartDataset:
    return ChartDataset(parse_charts_name(name), split)


LARGEST, SMALLEST = "tallest|longest|highest|largest", "shortest|lowest|smallest"


def extreme(table: Sequence[tuple[str, str, int]], adjective: str) -> tuple[str, str, int]:
    ranked = sorted(table, key=lambda row: row[2])
    return ranked[-1] if adjective in LARGEST.split("|") else ranked[0]
