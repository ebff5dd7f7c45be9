"""Axes that end or tick at round numbers, and the texts of the numbers along them.

    values -> x_axis, y_axis -> Axis

What is drawn between two axes is up to `plots.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Unit = Literal["number", "percent"]
"""Percent takes shares: 1.0 is 100 %."""

# Beyond these, the difference or ratio of two numbers may not be a number.
_LARGEST = 1e100
_SMALLEST = 1e-100

_NICE = (1, 2, 5, 10)


def is_drawable(value: float) -> bool:
    """Tell whether a value is a number of a size that can be drawn."""
    return abs(value) < _LARGEST  # False for NaN too


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A range of values with labelled ticks."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def share(self, value: float) -> float:
        """Return where a value lies: 0 at the low end, 1 at the high end."""
        return (value - self.low) / (self.high - self.low)


def x_axis(values: Sequence[float]) -> Axis:
    """Span exactly the values."""
    low, high = _widen(min(values), max(values))
    step = _nice_step(high - low, 6)
    if all(value == int(value) for value in values):
        step = max(step, 1.0)  # there is no step 2.5
    return Axis(low=low, high=high, ticks=_label_ticks(_multiples(low, high, step), step, "number"))


def y_axis(values: Sequence[float], unit: Unit) -> Axis:
    """Span the values from round number to round number."""
    low, high = _widen(min(values), max(values))
    step = _nice_step(high - low, 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [index * step for index in range(first, last + 1)]
    return Axis(low=first * step, high=last * step, ticks=_label_ticks(ticks, step, unit))


def _widen(low: float, high: float) -> tuple[float, float]:
    """Make room around a single value."""
    size = max(abs(low), abs(high))
    if high - low > max(1e-9 * size, _SMALLEST):
        return low, high
    room = 0.1 * size if size > _SMALLEST else 1.0
    return low - room, high + room


def _nice_step(span: float, max_steps: int) -> float:
    """Return the least of 1, 2, 5, 10, ... that covers a span in at most `max_steps` steps."""
    least = span / max_steps
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in _NICE if least <= factor * power * (1 + 1e-9))


def _multiples(low: float, high: float, step: float) -> list[float]:
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def format_value(value: float, unit: Unit = "number") -> str:
    """Format a value with about four significant digits: `1,250`, `0.4123`, `1.5e−4`, `71.5 %`, `NaN`."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if unit == "percent":
        return _minus(f"{100 * value:.1f} %")
    if abs(value) < 1e9 and value == int(value):
        return _minus(f"{int(value):,}")
    power = math.floor(math.log10(abs(value)))
    if -4 < power < 6:
        return _fixed(value, 10.0 ** min(power - 3, 0))
    return _scientific(value, 10.0 ** (power - 3))


def _label_ticks(ticks: Sequence[float], step: float, unit: Unit) -> tuple[tuple[float, str], ...]:
    """Label ticks with as many decimals as it takes to tell them apart."""
    size = max(map(abs, ticks), default=0.0)
    return tuple((tick, _tick_label(tick, step, size, unit)) for tick in ticks)


def _tick_label(tick: float, step: float, size: float, unit: Unit) -> str:
    if unit == "percent":
        return f"{_fixed(100 * tick, 100 * step)} %"
    return _fixed(tick, step) if size == 0 or 1e-3 <= size < 1e6 else _scientific(tick, step)


def _fixed(value: float, step: float) -> str:
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return _minus(f"{round(value, decimals) + 0.0:,.{decimals}f}")  # + 0.0: there is no minus zero


def _scientific(value: float, step: float) -> str:
    if abs(value) < step / 2:
        return "0"
    digits = math.floor(math.log10(abs(value)) + 1e-9) - math.floor(math.log10(step) + 1e-9)
    mantissa, exponent = f"{value:.{max(digits, 0)}e}".split("e")
    return _minus(f"{_trim(mantissa)}e{int(exponent)}")


def _trim(number: str) -> str:
    """Drop decimals that are zero."""
    return number.rstrip("0").rstrip(".") if "." in number and "e" not in number else number


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")
