"""Where a model got worse, as a table and as cards."""

from __future__ import annotations

from collections.abc import Sequence

from vlmray.benchmark.scoreboard import Scoreboard
from vlmray.benchmark.slices.finding import FEWEST_IMAGES, SliceSearch, WorseSlice, name_slice
from vlmray.benchmark.verdicts import format_p, format_range
from vlmray.reports.gallery import Gallery, GalleryItem
from vlmray.reports.tables import Column, Table
from vlmray.reports.text import format_percent, format_points

_NUM_CARDS = 24


def cards_of_each(num_slices: int) -> int:
    """Return how many samples of each of so many parts are shown: all together not too many for a page."""
    return max(2, min(8, _NUM_CARDS // max(1, num_slices)))


def worse_table(board: Scoreboard, search: SliceSearch) -> Table:
    """One row for each part on which a model is worse."""
    metric, base = board.metrics[0], board.models[0]
    rows = []
    for each in search.worse:
        found = each.found
        score = board.score(base, metric, found.kind, found.group)
        difference = found.difference
        rows.append(
            (
                name_slice(found),
                found.model,
                f"{difference.num_samples:,}",
                format_percent(score.mean),
                format_points(difference.mean),
                format_range(difference),
                format_p(found.p_corrected),
                f"{difference.num_gained:,}",
                f"{difference.num_lost:,}",
            )
        )
    return Table(
        title="Where it got worse",
        columns=(
            Column("slice"), Column("model"), Column("samples", True), Column(base, True),
            Column("points", True), Column("95 % interval", True), Column("p", True),
            Column("gained", True), Column("lost", True),
        ),
        rows=tuple(rows),
        note=f"{describe_search(search)} By {metric}; p is one-sided and corrected by Holm for all of that.",
    )  # fmt: skip


def describe_search(search: SliceSearch) -> str:
    """Say what was looked at, and how far that can be trusted."""
    return (
        f"{search.num_slices} slices by {', '.join(search.kinds)}, of {FEWEST_IMAGES} images or more, were "
        "looked at; where nothing changed, 95 of 100 such searches find nothing."
    )


def worse_galleries(
    base: str, worse: Sequence[WorseSlice], items_of_each: Sequence[Sequence[GalleryItem]]
) -> list[Gallery]:
    """Show samples that each part lost."""
    return [
        Gallery(
            title=f"Worse: {name_slice(each.found)}",
            items=tuple(items),
            note=(
                f"{each.found.model} answers these worse than {base}; the prediction is that of "
                f"{each.found.model}. {len(items)} of {len(each.lost):,} are shown."
            ),
        )
        for each, items in zip(worse, items_of_each, strict=True)
    ]
