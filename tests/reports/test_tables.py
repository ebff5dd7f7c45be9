"""One table, for a page, a terminal and Markdown."""

from __future__ import annotations

from vlmray.reports.tables import Cell, Column, Table


def test_one_table_three_ways() -> None:
    table = Table(
        title="T",
        columns=(Column("name"), Column("score", numeric=True)),
        rows=(("a|b", Cell("50.0 %", 0.5)),),
    )
    assert table.to_markdown() == "| name | score |\n| --- | ---: |\n| a\\|b | 50.0 % |"
    assert table.to_text() == "name   score\n----  ------\na|b   50.0 %"
