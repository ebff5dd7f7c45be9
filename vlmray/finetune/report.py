"""One fine-tuning run as a closing table and an HTML page; measures nothing.

    the trainer's log history, checks, counts -> TrainingReport -> format_training_table
                                                                -> render_training_html

The history is the list of mappings that transformers' trainer logs: entries with `loss` while it trains,
with `eval_loss` and `eval_<metric>` where it evaluates, and a last one about the whole run, which is not
used. All functions return text, so whoever owns the output folder decides how it is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from vlmray.finetune.results import Check, Curve, TrainingReport
from vlmray.reports.axes import format_value
from vlmray.reports.errors import error_table, option_table
from vlmray.reports.gallery import Gallery, GalleryItem
from vlmray.reports.page import Fact, Page, Section, render_page
from vlmray.reports.plots import Plot, Series
from vlmray.reports.tables import Column, Mark, Table
from vlmray.reports.text import clean_text, fit, format_duration, format_percent, format_rate, shorten

MIN_POINTS_TO_SMOOTH = 50
"""A loss logged more often is noise around a trend, and is shown as both."""


# ---------------------------------------------------------------------------------------------
# Closing table
# ---------------------------------------------------------------------------------------------


def format_training_table(report: TrainingReport) -> str:
    """Format the closing table of a run: plain text, at most 80 columns wide."""
    num_in = report.num_samples + report.num_failed
    lines = [
        f"{num_in:,} samples in = {report.num_samples:,} trained on + {report.num_failed:,} failed",
        f"{_plural(report.num_steps, 'step')}, {format_rate(report.samples_per_s)} samples/s,"
        f" {format_duration(report.elapsed_s)} elapsed",
        _parameter_line(report),
        *(_check_line(check) for check in report.checks),
    ]
    curves = _curve_table(report)
    table = [curves.to_text(), ""] if curves.rows else []
    return "\n".join(table + [fit(clean_text(line)) for line in lines])


def _curve_table(report: TrainingReport) -> Table:
    """Set the first value of each curve beside its last."""
    curves: list[tuple[str, Curve, Callable[[float], str]]] = [
        ("train loss", report.train_loss, _format_loss),
        ("eval loss", report.eval_loss, _format_loss),
        (f"eval {shorten(report.metric or '', 40)}", report.eval_score, _format_share),
    ]
    labels = ("first", "at step", "last", "at step")
    return Table(
        title="First and last",
        columns=(Column(""), *(Column(label, numeric=True) for label in labels)),
        rows=tuple(
            (name, to_text(curve[0][1]), _step(curve[0]), to_text(curve[-1][1]), _step(curve[-1]))
            for name, curve, to_text in curves
            if curve
        ),
    )


def _parameter_line(report: TrainingReport) -> str:
    modules = "" if report.num_targets is None else f", in {_plural(report.num_targets, 'adapted module')}"
    return (
        f"{_format_count(report.num_trainable)} of {_format_count(report.num_parameters)} parameters trained"
        f" ({format_percent(_trained_share(report))}){modules}"
    )


def _check_line(check: Check) -> str:
    line = f"{'PASS' if check.passed else 'FAIL'}  {check.name}" + (
        f": {check.detail}" if check.detail else ""
    )
    return " ".join(line.split())


# ---------------------------------------------------------------------------------------------
# Page
# ---------------------------------------------------------------------------------------------


def render_training_html(report: TrainingReport) -> str:
    """Render the run as one HTML page that needs nothing but itself."""
    sections: list[Section] = [*plot_curves(report)]
    if report.checks:
        sections.append(_check_table(report.checks))
    if report.gallery:
        sections.append(_trained_gallery(report.gallery))
    if report.errors:
        sections.append(error_table(report.errors))
    sections += _folded_plots(report)
    if report.options:
        sections.append(option_table(report.options))
    return render_page(
        Page(title=report.title, headline=_headline(report), facts=_facts(report), sections=tuple(sections))
    )


def _headline(report: TrainingReport) -> Fact:
    note = _failed_checks(report.checks)
    if report.eval_score:
        first, last = report.eval_score[0], report.eval_score[-1]
        return Fact(
            f"{report.metric} {_when(last, report)}",
            _format_share(last[1]),
            _join(_first_score(report.eval_score), _best_score(report.eval_score), note),
        )
    if report.train_loss:
        first, last = report.train_loss[0], report.train_loss[-1]
        started = f"{_format_loss(first[1])} at step {_step(first)}." if first != last else ""
        return Fact(f"training loss {_when(last, report)}", _format_loss(last[1]), _join(started, note))
    return Fact("steps done; no loss was logged", f"{report.num_steps:,}", note)


def _when(point: tuple[float, float], report: TrainingReport) -> str:
    """Say at which step a value was logged, and whether training went on after it."""
    if point[0] == report.num_steps:
        return f"after {_plural(report.num_steps, 'step')}"
    return f"at step {_step(point)} of {report.num_steps:,}"


def _first_score(curve: Curve) -> str:
    first = curve[0]
    if len(curve) == 1:
        return "The only evaluation." if first[0] else "The only evaluation, before training."
    when = "before training (step 0)" if first[0] == 0 else f"at step {_step(first)}, the first evaluation"
    return f"{_format_share(first[1])} {when}."


def _best_score(curve: Curve) -> str:
    """Say which evaluation after the first was better than the last one, if any was."""
    valued = [point for point in curve[1:] if math.isfinite(point[1])]
    best = max(valued, key=lambda point: point[1], default=curve[-1])
    is_last = best[1] == curve[-1][1] or best == curve[-1]
    return "" if is_last else f"{_format_share(best[1])} at step {_step(best)}, the best."


def _failed_checks(checks: Sequence[Check]) -> str:
    num_failed = sum(not check.passed for check in checks)
    return f"{num_failed} of {len(checks)} checks failed." if num_failed else ""


def _facts(report: TrainingReport) -> tuple[Fact, ...]:
    facts = [
        Fact("steps", f"{report.num_steps:,}"),
        Fact("samples", f"{report.num_samples:,}", "trained on"),
        Fact("failed", f"{report.num_failed:,}"),
        Fact("samples/s", format_rate(report.samples_per_s)),
        Fact("elapsed", format_duration(report.elapsed_s)),
        Fact(
            "parameters trained",
            format_percent(_trained_share(report)),
            f"{_format_count(report.num_trainable)} of {_format_count(report.num_parameters)}",
        ),
    ]
    if report.num_targets is not None:
        facts.append(Fact("adapted modules", f"{report.num_targets:,}"))
    return tuple(facts)


def plot_curves(report: TrainingReport) -> list[Plot]:
    """Plot loss and score over the steps, as far as the history has them."""
    plots = []
    if report.train_loss or report.eval_loss:
        plots.append(_loss_plot(report))
    if report.eval_score:
        plots.append(_score_plot(report))
    return plots


def _loss_plot(report: TrainingReport) -> Plot:
    train, evaluation = report.train_loss, report.eval_loss
    series = [Series(name="train loss", points=train)] if train else []
    note = ""
    if len(train) > MIN_POINTS_TO_SMOOTH:
        reach = len(train) // 40
        note = f"Smoothed: the mean of a logged loss with the {reach} before and after it."
        series = [
            Series(name="train loss", points=train, style="faint"),
            Series(name="train loss, smoothed", points=_smooth(train, reach)),
        ]
    if evaluation:
        series.append(Series(name="eval loss", points=evaluation, style="dots"))
    return Plot(
        title="Loss", x_label="step", y_label="loss", series=tuple(series), y_include=(0.0,), note=note
    )


def _score_plot(report: TrainingReport) -> Plot:
    return Plot(
        title="Evaluation",
        x_label="step",
        y_label="mean over the evaluation samples",
        series=(Series(name=str(report.metric), points=report.eval_score, style="dots"),),
        y_unit="percent",
        y_include=(0.0, 1.0),
    )


def _folded_plots(report: TrainingReport) -> list[Plot]:
    """Plot what is looked up rather than read."""
    titles = {"learning_rate": "Learning rate", "grad_norm": "Gradient norm"}
    return [
        Plot(
            title=title,
            x_label="step",
            y_label="",
            series=(Series(name=title.lower(), points=curve),),
            y_include=(0.0,),
            collapsed=True,
        )
        for key, title in titles.items()
        if (curve := report.curve(key))
    ]


def _smooth(curve: Curve, reach: int) -> Curve:
    """Mean each value with its neighbours; gaps stay gaps."""
    smoothed = []
    for index, (step, value) in enumerate(curve):
        back = min(reach, index)  # and no further ahead, or the steep start would look lower than it was
        values = [near for _, near in curve[index - back : index + back + 1] if math.isfinite(near)]
        smoothed.append((step, math.fsum(values) / len(values) if math.isfinite(value) else math.nan))
    return tuple(smoothed)


def _check_table(checks: Sequence[Check]) -> Table:
    return Table(
        title="Checks of the result",
        columns=(Column("check"), Column("result"), Column("detail")),
        rows=tuple(
            (check.name, Mark("right", "passed") if check.passed else Mark("wrong", "failed"), check.detail)
            for check in checks
        ),
    )


def _trained_gallery(items: tuple[GalleryItem, ...]) -> Gallery:
    note = "Evaluation samples, answered by the trained model; their mix is not the score."
    return Gallery(title="Samples", items=items, note=note)


# ---------------------------------------------------------------------------------------------
# Texts and numbers
# ---------------------------------------------------------------------------------------------


def _trained_share(report: TrainingReport) -> float | None:
    return report.num_trainable / report.num_parameters if report.num_parameters else None


def _format_share(value: float) -> str:
    return format_percent(value) if math.isfinite(value) else format_value(value)


def _format_loss(value: float) -> str:
    """Format with the same decimals every time, as long as these say something."""
    return f"{value:.3f}" if 1e-3 <= abs(value) < 1e4 else format_value(value)


def _step(point: tuple[float, float]) -> str:
    return format_value(point[0])


def _format_count(count: int) -> str:
    """Format a number of parameters: `960`, `20.2 M`, `3.75 B`."""
    for size, name in ((10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.3g} {name}" if count < 100 * size else f"{count / size:,.0f} {name}"
    return f"{count:,}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _join(*sentences: str) -> str:
    return " ".join(filter(None, sentences))
