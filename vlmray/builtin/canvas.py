"""What a chart is drawn with: colours, text, and shapes without ragged edges."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from PIL import Image, ImageDraw, ImageFont

RGB = tuple[int, int, int]
Point = tuple[float, float]


def _rgb(code: str) -> RGB:
    red, green, blue = bytes.fromhex(code)
    return red, green, blue


SUPERSAMPLE = 3  # shapes are drawn this many times larger, then averaged down to smooth their edges

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
        """Pixels from left to right."""
        return self.right - self.left

    @property
    def height(self) -> float:
        """Pixels from top to bottom."""
        return self.bottom - self.top

    @property
    def centre(self) -> Point:
        """Where the diagonals meet."""
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
def text_width(text: str, size: int) -> float:
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
        left, top, right, bottom = (snap(edge) * SUPERSAMPLE for edge in box)
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
        x, y = snap(position[0]), snap(position[1])
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


def snap(position: float) -> int:
    """Round halves up: `round` sends them to even numbers, which makes even spacing uneven."""
    return math.floor(position + 0.5)


def _enlarge(point: Point) -> Point:
    return point[0] * SUPERSAMPLE, point[1] * SUPERSAMPLE


def _around(centre: Point, radius: float) -> tuple[float, float, float, float]:
    (x, y), r = _enlarge(centre), radius * SUPERSAMPLE
    return x - r, y - r, x + r, y + r


def polar(centre: Point, radius: float, angle: float) -> Point:
    """Return the point at an angle in degrees clockwise from three o'clock."""
    radians = math.radians(angle)
    return centre[0] + radius * math.cos(radians), centre[1] + radius * math.sin(radians)
