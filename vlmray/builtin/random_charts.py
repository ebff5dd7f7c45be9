"""Charts drawn by lot: what they say, and how they look."""

from __future__ import annotations

import random

from vlmray.builtin.canvas import COLOURS, PALETTES, THEMES, Chart, Kind, Scale, Style
from vlmray.builtin.drawing import MARKERS

# ---------------------------------------------------------------------------------------------
# Charts: what a picture says and how it looks, chosen by a seeded generator
# ---------------------------------------------------------------------------------------------

TITLES = ("Sales", "Votes", "Points", "Hours", "Visits", "Orders")
LABELS = (
    ("A", "B", "C", "D", "E", "F", "G", "H"),
    ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"),
    ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul"),
    ("Ann", "Ben", "Eve", "Ida", "Leo", "Max", "Tom", "Zoe"),
    ("Ant", "Bee", "Cat", "Cow", "Dog", "Fox", "Hen", "Owl", "Pig"),
)
SIZES = ((168, 140), (196, 140), (196, 168), (224, 168))  # multiples of 28 pixels
NUM_MARKS = (3, 4, 5, 6)
STYLES = ("varied", "plain")
PLAIN = Style(
    size=SIZES[0], theme="white", palette="vivid", font_size=10, legend="none", print_values=False,
    axis_numbers=True, grid=True, outline=False, bar_width=0.65, marker="circle", hole=0.0, rotation=0,
)  # fmt: skip

# Ten levels can be told apart against gridlines; finer values are only used where they are printed.
COARSE_SCALES = (Scale(10, 1, 2), Scale(20, 2, 4), Scale(50, 5, 10), Scale(100, 10, 20))
FINE_SCALES = (Scale(20, 1, 5), Scale(100, 5, 20))
PIE_SCALE = Scale(100, 5, 20)
SMALLEST_SHARE, SHARE_GAP = 9, 2  # per cent: room for the printed number, and shares that look different


def sample_chart(rng: random.Random, kinds: tuple[Kind, ...], *, plain: bool) -> Chart:
    """Draw lots for a chart: its kind, values, labels and looks."""
    kind, count = rng.choice(kinds), rng.choice(NUM_MARKS)
    style = PLAIN if plain else _sample_style(rng)
    if kind == "pie":
        scale, values = PIE_SCALE, _sample_shares(rng, count)
    else:
        scale = rng.choice(COARSE_SCALES + FINE_SCALES if style.print_values else COARSE_SCALES)
        values = rng.sample(range(scale.step, scale.top + 1, scale.step), count)
    pool = LABELS[0] if plain else rng.choice(LABELS)
    return Chart(
        kind=kind,
        title="" if plain else rng.choice(("", *TITLES)),
        labels=tuple(pool[index] for index in sorted(rng.sample(range(len(pool)), count))),
        colours=tuple(rng.sample(COLOURS, count)),
        values=tuple(values),
        scale=scale,
        style=style,
    )


def _sample_style(rng: random.Random) -> Style:
    theme = rng.choice(tuple(THEMES))
    print_values = rng.random() < 0.5
    # A value must be readable: where it is not printed, axis numbers and gridlines are.
    axis_numbers = not print_values or rng.random() < 0.6
    return Style(
        size=rng.choice(SIZES),
        theme=theme,
        # The deep palette's blue and brown would sink into a dark background.
        palette=rng.choice([name for name in PALETTES if (theme, name) != ("dark", "deep")]),
        font_size=rng.choice((10, 11)),
        legend=rng.choice(("none", "none", "right", "bottom")),
        print_values=print_values,
        axis_numbers=axis_numbers,
        grid=not print_values or (axis_numbers and rng.random() < 0.6),
        outline=rng.random() < 0.3,
        bar_width=rng.choice((0.5, 0.65, 0.8)),
        marker=rng.choice(tuple(MARKERS)),
        hole=rng.choice((0.0, 0.0, 0.42)),
        rotation=rng.randrange(0, 360, 15),
    )


def _sample_shares(rng: random.Random, count: int) -> list[int]:
    """Draw whole percentages that sum to 100, the closest two `SHARE_GAP` apart, in random order."""
    shares = [SMALLEST_SHARE + SHARE_GAP * rank for rank in range(count)]
    # Raising a share and all larger ones together keeps the gaps; the last alone can take any rest.
    while left := 100 - sum(shares):
        rank = rng.choice([rank for rank in range(count) if count - rank <= left])
        rise = rng.randint(1, left // (count - rank))
        shares[rank:] = [share + rise for share in shares[rank:]]
    rng.shuffle(shares)
    return shares
