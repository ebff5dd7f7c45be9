"""Confidence as sections of a page."""

from __future__ import annotations

from collections.abc import Sequence

from vlmray.inference.certainty.assessing import Certainty
from vlmray.metrics.calibration import Bin, Threshold
from vlmray.reports.page import Section
from vlmray.reports.plots import Plot, Series
from vlmray.reports.tables import Column, Table, ranged_cell
from vlmray.reports.text import format_percent, format_with_range


def certainty_sections(found: Sequence[Certainty]) -> list[Section]:
    """Show how sure models are, and how far that can be relied on."""
    if not found:
        return []
    tables = [certainty_table(found), *_threshold_tables(found)]
    return [*tables, reliability_plot(found), risk_plot(found), bin_table(found)]


def certainty_table(found: Sequence[Certainty]) -> Table:
    """Set confidence against accuracy, one row for each model."""
    notes = [
        "Confidence: the probability that the model gave its whole answer, on average. Calibration error: "
        "how far it is from the score, on average over answers of like confidence, less what chance adds. "
        "Intervals: 95 %, bootstrap over " + ("images." if found[0].knows_images else "samples."),
    ]
    if not found[0].knows_images:
        notes.append("Which samples share an image is not known here, so they may be too narrow.")
    return Table(
        title="How sure",
        columns=(
            Column("model"), Column("answers", True), Column("confidence", True),
            Column(found[0].metric, True), Column("calibration error", True),
        ),
        rows=tuple(
            (
                each.model or "all",
                f"{each.calibration.num_samples:,}",
                format_percent(each.calibration.confidence),
                format_percent(each.calibration.accuracy.mean),
                format_with_range(each.calibration.error, each.calibration.low, each.calibration.high),
            )
            for each in found
        ),
        note=" ".join(notes),
    )  # fmt: skip


def _threshold_tables(found: Sequence[Certainty]) -> list[Table]:
    thresholds = [(each, each.threshold) for each in found if each.threshold is not None]
    if not thresholds:
        return []
    first = thresholds[0][1]
    return [
        Table(
            title=f"Where answers score {format_percent(first.target)}",
            columns=(
                Column("model"), Column("from confidence", True), Column("answered", True),
                Column(found[0].metric, True),
            ),
            rows=tuple((each.model or "all", *_threshold_cells(threshold)) for each, threshold in thresholds),
            note=(
                "Answers of at least this confidence score so much or more on average, "
                f"{100 * first.level:g} % sure, as long as what is asked stays like this; the score is that "
                "of these answers here. Exact binomial test of each twentieth of the answers, for as many "
                "independent ones as those about common images are worth."
            ),
        )
    ]  # fmt: skip


def _threshold_cells(found: Threshold) -> tuple[str, str, str]:
    if found.confidence is None:
        return "none is shown", "–", "–"
    return f"{found.confidence:.6g}", format_percent(found.coverage), format_percent(found.accuracy)


def reliability_plot(found: Sequence[Certainty], measure: str = "confidence") -> Plot:
    """Draw the score of answers of like confidence, or of another measure of it."""
    ideal = Series(name="as right as sure", points=((0.0, 0.0), (1.0, 1.0)), style="faint")
    return Plot(
        title="Reliability" if measure == "confidence" else f"Reliability of {measure}",
        x_label=measure,
        y_label=found[0].metric,
        series=(ideal, *(_bins(each) for each in found)),
        y_unit="percent",
        y_include=(0.0, 1.0),
        note="Below the line, a model is surer than it is right. A dot is about a tenth of the answers, or "
        f"those of the same {measure}.",
    )


def bin_table(found: Sequence[Certainty], measure: str = "confidence") -> Table:
    """List what answers of like confidence score, or of another measure of it."""
    return Table(
        title=f"Answers of like {measure}",
        columns=(
            Column(measure), Column("answers", True), Column(f"mean {measure}", True),
            Column(found[0].metric, True),
        ),
        rows=tuple(
            (
                f"{each.model + ': ' if each.model else ''}{_ends(bin_)}",
                f"{bin_.accuracy.num_samples:,}",
                format_percent(bin_.confidence),
                ranged_cell(bin_.accuracy.mean, bin_.accuracy.low, bin_.accuracy.high),
            )
            for each in found
            for bin_ in each.calibration.bins
        ),
        note="Intervals: 95 %.",
        collapsed=True,
    )  # fmt: skip


def _ends(found: Bin) -> str:
    low, high = f"{found.low:.4g}", f"{found.high:.4g}"
    return low if low == high else f"{low} to {high}"


def _bins(each: Certainty) -> Series:
    points = tuple((found.confidence, found.accuracy.mean) for found in each.calibration.bins)
    return Series(name=each.model or "answers", points=points, style="dots")


def risk_plot(found: Sequence[Certainty], measure: str = "confidence") -> Plot:
    """Draw what is wrong of the answers that are the surest by a measure."""
    return Plot(
        title="Risk against coverage" + ("" if measure == "confidence" else f", by {measure}"),
        x_label="share that is answered, the surest first",
        y_label="wrong of these",
        series=tuple(Series(name=each.model or "answers", points=each.curve) for each in found),
        y_unit="percent",
        y_include=(0.0,),
        note="What is wrong of the answers, where only the surest ones are given.",
    )
