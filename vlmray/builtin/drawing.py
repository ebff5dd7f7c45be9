"""Draws one chart with Pillow: the picture side of the built-in chart dataset.

    Chart (what it says) + Style (how it looks) -> Canvas -> RGB image

A chart is a handful of marks, and a mark is a label, a colour and a value; `kind` decides whether
marks become bars, points or slices. Title, legend and axes each carve their strip off a `Box` and
the rest goes to the kind's own function in `DRAWERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from vlmray.builtin.canvas import RGB, Box, Canvas, Chart, Kind, Marker, Point, Style, polar, snap, text_width

MARGIN = 5  # pixels kept free along every edge of the image


# Markers are regular polygons around the origin: number of corners, radius, angle of the first one.
_MARKER_SHAPES: dict[Marker, tuple[int, float, float]] = {
    "circle": (24, 4, 0),
    "square": (4, 5, 45),
    "diamond": (4, 5.5, 0),
}
MARKERS: dict[Marker, list[Point]] = {
    marker: [polar((0.0, 0.0), radius, first + 360 / corners * corner) for corner in range(corners)]
    for marker, (corners, radius, first) in _MARKER_SHAPES.items()
}


def draw_chart(chart: Chart) -> Canvas:
    """Lay out and draw one chart; `render()` of the result is the picture."""
    canvas = Canvas(chart.style)
    width, height = chart.style.size
    box = Box(MARGIN, MARGIN, width - MARGIN, height - MARGIN)
    box = _draw_title(canvas, chart, box)
    box = _draw_legend(canvas, chart, box)
    DRAWERS[chart.kind](canvas, chart, box)
    return canvas


def _line_height(style: Style) -> int:
    return style.font_size + 3


def _draw_title(canvas: Canvas, chart: Chart, box: Box) -> Box:
    if not chart.title:
        return box
    size = chart.style.font_size + 1
    canvas.text((box.centre[0], box.top), chart.title, anchor="mt", size=size)
    return box.inset(top=size + 5)


def _draw_legend(canvas: Canvas, chart: Chart, box: Box) -> Box:
    """Draw the legend, if any, and return what is left of the box."""
    style, count = chart.style, len(chart.labels)
    if style.legend == "none":
        return box
    entries = _legend_entries(chart)
    swatch = style.font_size - 2
    cell = swatch + 4 + math.ceil(max(text_width(entry, style.font_size) for entry in entries))
    pitch = style.font_size + 5
    if style.legend == "right":
        columns, rows, gap = 1, count, 0.0
        left, top = box.right - cell, box.centre[1] - rows * pitch / 2
        rest = box.inset(right=cell + 8)
    else:
        rows = math.ceil(count / (box.width // (cell + 6)))
        columns = math.ceil(count / rows)
        gap = min(14.0, (box.width - columns * cell) / columns)
        left, top = box.centre[0] - (columns * (cell + gap) - gap) / 2, box.bottom - rows * pitch
        rest = box.inset(bottom=rows * pitch + 3)
    for index, (entry, fill) in enumerate(zip(entries, chart.fills, strict=True)):
        x, y = left + index % columns * (cell + gap), top + (index // columns + 0.5) * pitch
        mark = Box(x, y - swatch / 2, x + swatch, y + swatch / 2)
        canvas.rectangle(mark, fill, outline=style.outline)
        canvas.text((x + swatch + 4, y), entry, anchor="lm")
    return rest


def _legend_entries(chart: Chart) -> list[str]:
    if chart.kind != "pie" or chart.style.print_values:
        return list(chart.labels)
    return [f"{label} {value}%" for label, value in zip(chart.labels, chart.values, strict=True)]


def _ticks(chart: Chart) -> Iterator[tuple[float, str]]:
    """Yield where the value axis is marked, as a share of its length, and the number there.

    Small marks without a number stand at each step that a reader has to tell apart by eye.
    """
    top, step, tick = chart.scale
    for value in range(0, top + 1, tick if chart.style.print_values else step):
        yield value / top, "" if value % tick else str(value)


def _fitting_size(texts: Sequence[str], room: float, size: int) -> int:
    """Return `size`, or the next smaller one (8 at least) at which each text fits into `room` pixels."""
    while size > 8 and max(text_width(text, size) for text in texts) > room:
        size -= 1
    return size


def _draw_upright_axes(canvas: Canvas, chart: Chart, box: Box) -> tuple[Box, list[float]]:
    """Draw a value axis at the left and labels below; return the plot and the marks' centres."""
    style, theme = chart.style, canvas.theme
    numbers = text_width(str(chart.scale.top), style.font_size) + 6 if style.axis_numbers else 2
    headroom = _line_height(style) if style.print_values else style.font_size / 2
    footroom = _line_height(style) + 2 if style.legend == "none" else style.font_size / 2
    box = box.inset(left=numbers, top=headroom, bottom=footroom)
    # Whole pixels, so that gridlines and bar tops of equal value meet.
    plot = Box(*map(snap, box))
    for share, number in _ticks(chart):
        y = snap(plot.bottom - share * plot.height)
        if style.grid and number and share > 0:
            canvas.rule((plot.left, y), (plot.right, y), theme.grid)
        if style.axis_numbers:
            canvas.rule((plot.left - (3 if number else 2), y), (plot.left, y), theme.ink)
            canvas.text((plot.left - 5, y), number, anchor="rm")
    canvas.rule((plot.left, plot.bottom), (plot.right, plot.bottom), theme.ink)
    if style.axis_numbers:
        canvas.rule((plot.left, plot.top), (plot.left, plot.bottom), theme.ink)
    slot = plot.width / len(chart.labels)
    centres = [plot.left + slot * (index + 0.5) for index in range(len(chart.labels))]
    if style.legend == "none":
        size = _fitting_size(chart.labels, slot - 3, style.font_size)
        for x, label in zip(centres, chart.labels, strict=True):
            canvas.text((x, plot.bottom + 4 + style.font_size / 2), label, size=size)
    return plot, centres


def _draw_bars(canvas: Canvas, chart: Chart, box: Box) -> None:
    style = chart.style
    plot, centres = _draw_upright_axes(canvas, chart, box)
    half = plot.width / len(centres) * style.bar_width / 2
    for x, value, fill in zip(centres, chart.values, chart.fills, strict=True):
        top = snap(plot.bottom - value / chart.scale.top * plot.height)
        canvas.rectangle(Box(x - half, top, x + half, plot.bottom), fill, outline=style.outline)
        if style.print_values:
            canvas.text((x, top - 2), str(value), anchor="mb", halo=style.grid)


def _draw_lying_bars(canvas: Canvas, chart: Chart, box: Box) -> None:
    """Draw bars that grow to the right, the first one on top."""
    style, theme = chart.style, canvas.theme
    size = style.font_size
    names = max(text_width(label, size) for label in chart.labels) + 5 if style.legend == "none" else 2
    endroom = text_width(str(chart.scale.top), size) * (1 if style.print_values else 0.5) + 3
    footroom = _line_height(style) + 3 if style.axis_numbers else 1
    plot = Box(*map(snap, box.inset(left=names, right=endroom, bottom=footroom)))
    for share, number in _ticks(chart):
        x = snap(plot.left + share * plot.width)
        if style.grid and number and share > 0:
            canvas.rule((x, plot.top), (x, plot.bottom), theme.grid)
        if style.axis_numbers:
            canvas.rule((x, plot.bottom), (x, plot.bottom + (4 if number else 3)), theme.ink)
            canvas.text((x, plot.bottom + 5 + size / 2), number)
    if style.axis_numbers:
        canvas.rule((plot.left, plot.bottom), (plot.right, plot.bottom), theme.ink)
    slot = plot.height / len(chart.labels)
    for index, (label, value, fill) in enumerate(zip(chart.labels, chart.values, chart.fills, strict=True)):
        y, half = plot.top + slot * (index + 0.5), slot * style.bar_width / 2
        end = snap(plot.left + value / chart.scale.top * plot.width)
        canvas.rectangle(Box(plot.left, y - half, end, y + half), fill, outline=style.outline)
        if style.print_values:
            canvas.text((end + 3, y), str(value), anchor="lm", halo=style.grid)
        if style.legend == "none":
            canvas.text((plot.left - 4, y), label, anchor="rm")
    canvas.rule((plot.left, plot.top), (plot.left, plot.bottom), theme.ink)


def _draw_line(canvas: Canvas, chart: Chart, box: Box) -> None:
    """Draw a neutral line through coloured points."""
    style, theme = chart.style, canvas.theme
    plot, centres = _draw_upright_axes(canvas, chart, box)
    heights = [plot.bottom - value / chart.scale.top * plot.height for value in chart.values]
    points = list(zip(centres, heights, strict=True))
    between = tuple((a + b) // 2 for a, b in zip(theme.ink, theme.background, strict=True))
    canvas.line(points, (between[0], between[1], between[2]), 1.5)
    for index, ((x, y), value, fill) in enumerate(zip(points, chart.values, chart.fills, strict=True)):
        corners = [(x + right, y + down) for right, down in MARKERS[style.marker]]
        canvas.polygon(corners, fill, outline=style.outline)
        if style.print_values:
            below = _is_valley(heights, index) and plot.bottom - y > style.font_size + 8
            canvas.text((x, y + 6 if below else y - 6), str(value), anchor="mt" if below else "mb", halo=True)


def _is_valley(heights: list[float], index: int) -> bool:
    """Say whether the line leaves a point upwards on every side: its value then goes below it."""
    neighbours = heights[max(index - 1, 0) : index] + heights[index + 1 : index + 2]
    return all(y < heights[index] for y in neighbours)


def _draw_pie(canvas: Canvas, chart: Chart, box: Box) -> None:
    """Draw slices clockwise, percentages on them, labels around them where there is no legend."""
    style, theme = chart.style, canvas.theme
    if style.legend == "none":
        across = max(text_width(label, style.font_size) for label in chart.labels) + 4
        along = _line_height(style) + 1
        box = box.inset(left=across, top=along, right=across, bottom=along)
    centre, radius = box.centre, min(box.width, box.height) / 2
    bounds = [style.rotation - 90.0]
    for value in chart.values:
        bounds.append(bounds[-1] + value * 3.6)
    middles = [(start + end) / 2 for start, end in pairwise(bounds)]
    for (start, end), fill in zip(pairwise(bounds), chart.fills, strict=True):
        canvas.sector(centre, radius, start, end, fill)
    for angle in bounds[:-1]:
        canvas.line([centre, polar(centre, radius + 1, angle)], theme.background, 1.0)
    if style.hole:
        canvas.disc(centre, radius * style.hole, theme.background)
    if style.print_values or style.legend == "none":
        _draw_percentages(canvas, chart, centre, radius, middles)
    if style.legend == "none":
        for label, middle in zip(chart.labels, middles, strict=True):
            _draw_slice_label(canvas, polar(centre, radius + 3, middle), middle, label)


def _draw_percentages(
    canvas: Canvas, chart: Chart, centre: Point, radius: float, middles: list[float]
) -> None:
    """Write each slice's percentage on it."""
    style = chart.style
    inner = 0.74 * radius  # far enough out for room along the arc, and on the ring where there is a hole
    numbers = [f"{value}%" for value in chart.values]
    # No wider than the smallest slice is there: then neighbours do not touch.
    chord = 2 * inner * math.sin(math.pi * min(chart.values) / 100)
    size = _fitting_size(numbers, chord, style.font_size)
    for number, fill, middle in zip(numbers, chart.fills, middles, strict=True):
        canvas.text(polar(centre, inner, middle), number, fill=_ink_on(fill), size=size)


def _draw_slice_label(canvas: Canvas, position: Point, angle: float, label: str) -> None:
    """Write a label outside the rim, pushed outwards so that its box does not touch the slice."""
    outwards = polar((0.0, 0.0), 1.0, angle)
    half_width = text_width(label, canvas.style.font_size) / 2
    half_height = canvas.style.font_size / 2
    canvas.text((position[0] + outwards[0] * half_width, position[1] + outwards[1] * half_height), label)


def _ink_on(fill: RGB) -> RGB:
    """Return black or white, whichever reads better on a colour."""
    red, green, blue = fill
    return (20, 20, 20) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


DRAWERS: dict[Kind, Callable[[Canvas, Chart, Box], None]] = {
    "bar": _draw_bars,
    "hbar": _draw_lying_bars,
    "line": _draw_line,
    "pie": _draw_pie,
}
