"""Draws one chart with Pillow: the picture side of the built-in chart dataset.

    Chart (what it says) + Style (how it looks) -> Canvas -> RGB image

A chart is a handful of marks, and a mark is a label, a colour and a value; `kind` decides whether
marks become bars, points or slices. Title, legend and axes each carve their strip off a `Box` and
the rest goes to the kind's own function in `DRAWERS`. What is asked about a chart, and how charts
are chosen, lives in `charts.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

from PIL import Image, ImageDraw, ImageFont

RGB = tuple[int, int, int]
Point = tuple[float, float]


def _rgb(code: str) -> RGB:
    red, green, blue = bytes.fromhex(code)
    return red, green, blue


SUPERSAMPLE = 3  # shapes are drawn this many times larger, then averaged down to smooth their edges
MARGIN = 5  # pixels kept free along every edge of the image

# Eight colours nobody would name in two ways; each palette keeps them apart in its own register.
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
_HEX = {
    "vivid": "de2424 ff8a00 fad614 24a03c 235fe1 8434be ff82c3 7c4a22",
    "soft": "e2524e f69e4a f6de68 6cba70 5c92e4 986cd0 f8a8d2 9c6c48",
    "deep": "b4161c e4740e e8c214 147432 1844b4 7a2896 ee60a8 603818",
}
PALETTES: dict[str, dict[str, RGB]] = {
    palette: {name: _rgb(code) for name, code in zip(COLOURS, codes.split(), strict=True)}
    for palette, codes in _HEX.items()
}


class Theme(NamedTuple):
    """Colours of everything that is not a mark."""

    background: RGB
    ink: RGB
    grid: RGB


THEMES = {
    "white": Theme((255, 255, 255), (40, 40, 40), (216, 216, 216)),
    "cream": Theme((252, 247, 236), (64, 52, 40), (222, 212, 194)),
    "mist": Theme((234, 240, 247), (30, 44, 66), (200, 210, 222)),
    "dark": Theme((30, 33, 40), (236, 236, 236), (74, 79, 90)),
}

Kind = Literal["bar", "hbar", "line", "pie"]
Legend = Literal["none", "right", "bottom"]
Marker = Literal["circle", "square", "diamond"]


class Scale(NamedTuple):
    """A value axis from 0 to `top`: values are multiples of `step`, numbers stand every `tick`."""

    top: int
    step: int
    tick: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How a chart looks; never changes what it says."""

    size: tuple[int, int]
    """Width and height in pixels."""

    theme: str
    """Key of `THEMES`."""

    palette: str
    """Key of `PALETTES`."""

    font_size: int
    """Pixels; the title is one larger."""

    legend: Legend
    """Where labels are listed beside their colours; "none" writes them at the marks instead."""

    print_values: bool
    """Write each value at its mark. A pie always says its values; where this is off, in the legend if any."""

    axis_numbers: bool
    """Write numbers along the value axis."""

    grid: bool
    """Draw lines across the plot at the axis numbers."""

    outline: bool
    """Edge every mark with a thin line."""

    bar_width: float
    """Share of its slot that a bar fills."""

    marker: Marker
    """Shape of a line chart's points."""

    hole: float
    """Inner radius of a pie as a share of the outer one; 0 is a full pie."""

    rotation: int
    """Degrees clockwise from twelve o'clock to a pie's first slice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """What one picture says: marks in reading order (left to right, top to bottom, clockwise)."""

    kind: Kind
    title: str
    """Empty for a chart without one."""

    labels: tuple[str, ...]
    colours: tuple[str, ...]
    """Names from `COLOURS`, all different."""

    values: tuple[int, ...]
    """All different, so no extreme is tied; whole percentages that sum to 100 in a pie."""

    scale: Scale
    style: Style

    @property
    def fills(self) -> tuple[RGB, ...]:
        """RGB of each mark."""
        return tuple(PALETTES[self.style.palette][name] for name in self.colours)


class Box(NamedTuple):
    """A rectangle in image pixels."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        return self.right - self.left

    @property
    def height(self) -> float:
        return self.bottom - self.top

    @property
    def centre(self) -> Point:
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    def inset(self, *, left: float = 0, top: float = 0, right: float = 0, bottom: float = 0) -> Box:
        """Return the box with strips of the given widths taken off."""
        return Box(self.left + left, self.top + top, self.right - right, self.bottom - bottom)


class Text(NamedTuple):
    """A piece of text that waits for the shapes to be finished, and the pixels its ink covers."""

    position: tuple[int, int]
    text: str
    anchor: str
    size: int
    fill: RGB
    halo: bool
    box: Box


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)  # ships inside Pillow: charts look alike on every machine


@lru_cache(maxsize=4096)
def _text_width(text: str, size: int) -> float:
    """Return the advance of `text` in pixels."""
    return _font(size).getlength(text)


class Canvas:
    """Shapes on an enlarged sheet, text at final size on top.

    Edges need the averaging that the enlarged sheet gives them; small letters are blurred by it, so
    text is queued and drawn last, hinted for the size at which it is read.
    """

    def __init__(self, style: Style) -> None:
        self.style = style
        self.theme = THEMES[style.theme]
        self.texts: list[Text] = []
        width, height = style.size
        sheet_size = (width * SUPERSAMPLE, height * SUPERSAMPLE)
        self._sheet = Image.new("RGB", sheet_size, self.theme.background)
        self._draw = ImageDraw.Draw(self._sheet)

    def rectangle(self, box: Box, fill: RGB, *, outline: bool = False) -> None:
        """Fill `box`, snapped to whole pixels so that its edges stay crisp."""
        left, top, right, bottom = (_snap(edge) * SUPERSAMPLE for edge in box)
        edge = self.theme.ink if outline else None
        self._draw.rectangle((left, top, right - 1, bottom - 1), fill, edge, width=SUPERSAMPLE)

    def rule(self, start: Point, end: Point, fill: RGB) -> None:
        """Draw a horizontal or vertical line one pixel wide."""
        (left, top), (right, bottom) = start, end
        vertical = left == right
        self.rectangle(Box(left, top, left + 1 if vertical else right, bottom if vertical else top + 1), fill)

    def line(self, points: list[Point], fill: RGB, width: float) -> None:
        """Draw a line through `points`."""
        self._draw.line(
            [_enlarge(point) for point in points], fill, width=round(width * SUPERSAMPLE), joint="curve"
        )

    def polygon(self, points: list[Point], fill: RGB, *, outline: bool = False) -> None:
        """Fill the polygon with these corners."""
        edge = self.theme.ink if outline else None
        self._draw.polygon([_enlarge(point) for point in points], fill, edge, width=SUPERSAMPLE)

    def disc(self, centre: Point, radius: float, fill: RGB) -> None:
        """Fill a circle."""
        self._draw.ellipse(_around(centre, radius), fill)

    def sector(self, centre: Point, radius: float, start: float, end: float, fill: RGB) -> None:
        """Fill a slice of a circle between two angles, in degrees clockwise from three o'clock."""
        self._draw.pieslice(_around(centre, radius), start, end, fill)

    def text(
        self,
        position: Point,
        text: str,
        *,
        anchor: str = "mm",
        fill: RGB | None = None,
        size: int = 0,
        halo: bool = False,
    ) -> None:
        """Queue text at a position, Pillow's `anchor` saying which of its points lies there.

        `halo` edges the letters with the background, for text that a line may cross.
        """
        if not text:
            return
        size = size or self.style.font_size
        x, y = _snap(position[0]), _snap(position[1])
        left, top, right, bottom = _font(size).getbbox(text, anchor=anchor)
        box = Box(x + left, y + top, x + right, y + bottom)
        self.texts.append(Text((x, y), text, anchor, size, fill or self.theme.ink, halo, box))

    def render(self) -> Image.Image:
        """Return the finished RGB image."""
        image = self._sheet.reduce(SUPERSAMPLE)
        draw = ImageDraw.Draw(image)
        for item in self.texts:
            draw.text(
                item.position,
                item.text,
                item.fill,
                _font(item.size),
                item.anchor,
                stroke_width=1 if item.halo else 0,
                stroke_fill=self.theme.background if item.halo else None,
            )
        return image


def _snap(position: float) -> int:
    """Round halves up: `round` sends them to even numbers, which makes even spacing uneven."""
    return math.floor(position + 0.5)


def _enlarge(point: Point) -> Point:
    return point[0] * SUPERSAMPLE, point[1] * SUPERSAMPLE


def _around(centre: Point, radius: float) -> tuple[float, float, float, float]:
    (x, y), r = _enlarge(centre), radius * SUPERSAMPLE
    return x - r, y - r, x + r, y + r


def _polar(centre: Point, radius: float, angle: float) -> Point:
    """Return the point at an angle in degrees clockwise from three o'clock."""
    radians = math.radians(angle)
    return centre[0] + radius * math.cos(radians), centre[1] + radius * math.sin(radians)


# Markers are regular polygons around the origin: number of corners, radius, angle of the first one.
_MARKER_SHAPES: dict[Marker, tuple[int, float, float]] = {
    "circle": (24, 4, 0),
    "square": (4, 5, 45),
    "diamond": (4, 5.5, 0),
}
MARKERS: dict[Marker, list[Point]] = {
    marker: [_polar((0.0, 0.0), radius, first + 360 / corners * corner) for corner in range(corners)]
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
    cell = swatch + 4 + math.ceil(max(_text_width(entry, style.font_size) for entry in entries))
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
    while size > 8 and max(_text_width(text, size) for text in texts) > room:
        size -= 1
    return size


def _draw_upright_axes(canvas: Canvas, chart: Chart, box: Box) -> tuple[Box, list[float]]:
    """Draw a value axis at the left and labels below; return the plot and the marks' centres."""
    style, theme = chart.style, canvas.theme
    numbers = _text_width(str(chart.scale.top), style.font_size) + 6 if style.axis_numbers else 2
    headroom = _line_height(style) if style.print_values else style.font_size / 2
    footroom = _line_height(style) + 2 if style.legend == "none" else style.font_size / 2
    box = box.inset(left=numbers, top=headroom, bottom=footroom)
    # Whole pixels, so that gridlines and bar tops of equal value meet.
    plot = Box(*map(_snap, box))
    for share, number in _ticks(chart):
        y = _snap(plot.bottom - share * plot.height)
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
        top = _snap(plot.bottom - value / chart.scale.top * plot.height)
        canvas.rectangle(Box(x - half, top, x + half, plot.bottom), fill, outline=style.outline)
        if style.print_values:
            canvas.text((x, top - 2), str(value), anchor="mb", halo=style.grid)


def _draw_lying_bars(canvas: Canvas, chart: Chart, box: Box) -> None:
    """Draw bars that grow to the right, the first one on top."""
    style, theme = chart.style, canvas.theme
    size = style.font_size
    names = max(_text_width(label, size) for label in chart.labels) + 5 if style.legend == "none" else 2
    endroom = _text_width(str(chart.scale.top), size) * (1 if style.print_values else 0.5) + 3
    footroom = _line_height(style) + 3 if style.axis_numbers else 1
    plot = Box(*map(_snap, box.inset(left=names, right=endroom, bottom=footroom)))
    for share, number in _ticks(chart):
        x = _snap(plot.left + share * plot.width)
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
        end = _snap(plot.left + value / chart.scale.top * plot.width)
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
        across = max(_text_width(label, style.font_size) for label in chart.labels) + 4
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
        canvas.line([centre, _polar(centre, radius + 1, angle)], theme.background, 1.0)
    if style.hole:
        canvas.disc(centre, radius * style.hole, theme.background)
    if style.print_values or style.legend == "none":
        _draw_percentages(canvas, chart, centre, radius, middles)
    if style.legend == "none":
        for label, middle in zip(chart.labels, middles, strict=True):
            _draw_slice_label(canvas, _polar(centre, radius + 3, middle), middle, label)


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
        canvas.text(_polar(centre, inner, middle), number, fill=_ink_on(fill), size=size)


def _draw_slice_label(canvas: Canvas, position: Point, angle: float, label: str) -> None:
    """Write a label outside the rim, pushed outwards so that its box does not touch the slice."""
    outwards = _polar((0.0, 0.0), 1.0, angle)
    half_width = _text_width(label, canvas.style.font_size) / 2
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
