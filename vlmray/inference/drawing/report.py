"""Several draws of each answer as sections of a page."""

from __future__ import annotations

from collections.abc import Sequence

from vlmray.inference.certainty.report import bin_table, reliability_plot, risk_plot
from vlmray.inference.drawing.assessing import Drawn
from vlmray.metrics.significance import Interval
from vlmray.reports.page import Section
from vlmray.reports.tables import Cell, Column, Table, ranged_cell
from vlmray.reports.text import format_percent


def draw_sections(found: Sequence[Drawn]) -> list[Section]:
    """Show what several draws are worth, and how far their agreement tells right from wrong."""
    if not found:
        return []
    known = [each.certainty for each in found if each.certainty is not None]
    if not known:
        return [draw_table(found)]
    of_agreement = [plot(known, "agreement") for plot in (reliability_plot, risk_plot)]
    return [draw_table(found), *of_agreement, bin_table(known, "agreement")]


def draw_table(found: Sequence[Drawn]) -> Table:
    """Set the majority's score against that of the best of k draws, one column for each model."""
    numbers = {each.num_samples for each in found}
    rows: list[tuple[str | Cell, ...]] = []
    if len(numbers) > 1:
        rows.append(("draws", *(f"{each.num_samples}" for each in found)))
    rows.append(("agreement", *(format_percent(each.agreement) for each in found)))
    note = "Agreement: share of the draws that say what the prediction says, on average."
    if any(each.majority for each in found):
        rows.append(("majority vote", *(_score(each.majority) for each in found)))
        tries = sorted({k for each in found for k in each.passes})
        rows += [(f"pass@{k}", *(_score(each.passes.get(k)) for each in found)) for k in tries]
        metrics = " or ".join(dict.fromkeys(each.metric for each in found))
        whose = "images." if found[0].knows_images else "samples."
        note += (
            f" Majority vote: {metrics} of the predictions. pass@k: that of the best of k draws, if somebody "
            f"could tell which it is; with k 1 that of a single draw. Intervals: 95 %, bootstrap over {whose}"
        )
    return Table(
        title=f"Drawn {numbers.pop()} times" if len(numbers) == 1 else "Drawn several times",
        columns=(Column("measure"), *(Column(each.model or "all rows", True) for each in found)),
        rows=tuple(rows),
        note=note,
    )


def _score(found: Interval | None) -> str | Cell:
    return "–" if found is None else ranged_cell(found.mean, found.low, found.high)
