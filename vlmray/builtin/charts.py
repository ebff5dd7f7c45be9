"""The built-in synthetic chart dataset: small drawn charts whose answers are known by construction.

    'charts?num_rows=200&seed=7' -> ChartsConfig -> ChartDataset -> rows (image, question, answers)

Nothing is stored or downloaded. A row is a pure function of the config, the split and its index: any
row can be read alone, in any order, by any worker, and is the same on each. `num_rows` only says
where a split ends. Pictures are drawn in `chart_drawing.py`.

Question families, all of which apply to every kind of chart:

| family | asks | answer |
| --- | --- | --- |
| `count` | how many marks (bars, points, slices) there are | number |
| `count_above` | how many marks are above a value | number |
| `position` | the colour of the mark at an end, or just after another one | colour |
| `naming` | the label of the mark with a colour, or the colour of the one with a label | label or colour |
| `extreme` | the colour or the label of the largest or smallest mark | colour or label |
| `highest` | the highest value | number |
| `lowest` | the lowest value | number |
| `value_by_colour` | the value of the mark with a colour | number |
| `value_by_label` | the value of the mark with a label | number |
| `comparison` | whether one mark is larger than another | yes or no |
| `difference` | how far two marks are apart | number |
| `list` | the colours, labels or values of all marks, in order | as many, comma-separated |

Byte-identical images need the same Pillow release everywhere; questions and answers do not.
"""

from __future__ import annotations

import functools
import hashlib
import io
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import combinations, pairwise, permutations
from typing import NamedTuple, TypedDict
from urllib.parse import parse_qsl, urlencode

from vlmray.builtin.drawing import (
    COLOURS,
    DRAWERS,
    MARKERS,
    PALETTES,
    THEMES,
    Chart,
    Kind,
    Scale,
    Style,
    draw_chart,
)

SPLITS = ("train", "validation", "test")
KINDS: tuple[Kind, ...] = tuple(DRAWERS)


# ---------------------------------------------------------------------------------------------
# Questions: a family is one function from a chart to every question of that family it permits
# ---------------------------------------------------------------------------------------------


class Question(NamedTuple):
    """A question and its only answer."""

    text: str
    answer: str


class Words(NamedTuple):
    """How questions speak about one kind of chart."""

    mark: str
    largest: str
    smallest: str
    after: str
    """Where the next mark in reading order lies."""

    ends: tuple[str, str] | None
    """Names of the first and the last mark; None where the marks go round."""

    order: str
    """How all marks are listed; `{first}` is the colour of the one that begins."""

    value_of: str = "What is the value of"
    value: str = "value"
    unit: str = ""


_ACROSS = "from left to right"
WORDS: dict[Kind, Words] = {
    "bar": Words("bar", "tallest", "shortest", "right of", ("leftmost", "rightmost"), _ACROSS),
    "hbar": Words("bar", "longest", "shortest", "below", ("top", "bottom"), "from top to bottom"),
    "line": Words("point", "highest", "lowest", "right of", ("leftmost", "rightmost"), _ACROSS),
    "pie": Words(
        "slice", "largest", "smallest", "clockwise from", None, "clockwise from {first}",
        "What percent is", "percent", " percent",
    ),
}  # fmt: skip


def _namings(chart: Chart) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the two ways to name every mark: by its colour and by its label."""
    mark = WORDS[chart.kind].mark
    return tuple(f"the {colour} {mark}" for colour in chart.colours), chart.labels


def _count(chart: Chart) -> Iterator[Question]:
    yield Question(f"How many {WORDS[chart.kind].mark}s are there?", str(len(chart.values)))


def _count_above(chart: Chart) -> Iterator[Question]:
    words, scale = WORDS[chart.kind], chart.scale
    # A mark exactly at the threshold is hard to judge by eye, so thresholds avoid all values.
    free = [value for value in range(scale.step, scale.top, scale.step) if value not in chart.values]
    telling = [value for value in free if min(chart.values) < value < max(chart.values)]
    for threshold in telling or free:
        number = sum(value > threshold for value in chart.values)
        yield Question(f"How many {words.mark}s are above {threshold}{words.unit}?", str(number))


def _position(chart: Chart) -> Iterator[Question]:
    words, colours = WORDS[chart.kind], chart.colours
    following = list(pairwise(colours))
    if words.ends:
        yield Question(f"What colour is the {words.ends[0]} {words.mark}?", colours[0])
        yield Question(f"What colour is the {words.ends[1]} {words.mark}?", colours[-1])
    else:
        following.append((colours[-1], colours[0]))
    for colour, answer in following:
        yield Question(f"What colour is the {words.mark} just {words.after} {colour}?", answer)


def _naming(chart: Chart) -> Iterator[Question]:
    mark = WORDS[chart.kind].mark
    for colour, label in zip(chart.colours, chart.labels, strict=True):
        yield Question(f"Which label has the {colour} {mark}?", label)
        yield Question(f"What colour is the {mark} of {label}?", colour)


def _extreme(chart: Chart) -> Iterator[Question]:
    words = WORDS[chart.kind]
    for adjective, value in ((words.largest, max(chart.values)), (words.smallest, min(chart.values))):
        index = chart.values.index(value)
        yield Question(f"What colour is the {adjective} {words.mark}?", chart.colours[index])
        yield Question(f"Which label has the {adjective} {words.mark}?", chart.labels[index])


def _highest(chart: Chart) -> Iterator[Question]:
    yield Question(f"What is the highest {WORDS[chart.kind].value}?", str(max(chart.values)))


def _lowest(chart: Chart) -> Iterator[Question]:
    yield Question(f"What is the lowest {WORDS[chart.kind].value}?", str(min(chart.values)))


def _values_of(chart: Chart, names: tuple[str, ...]) -> Iterator[Question]:
    for name, value in zip(names, chart.values, strict=True):
        yield Question(f"{WORDS[chart.kind].value_of} {name}?", str(value))


def _value_by_colour(chart: Chart) -> Iterator[Question]:
    return _values_of(chart, _namings(chart)[0])


def _value_by_label(chart: Chart) -> Iterator[Question]:
    return _values_of(chart, _namings(chart)[1])


def _comparison(chart: Chart) -> Iterator[Question]:
    for names in _namings(chart):
        # Both orders of every pair, so that yes and no are equally common.
        for (one, value), (other, other_value) in permutations(zip(names, chart.values, strict=True), 2):
            yield Question(f"Is {one} larger than {other}?", "yes" if value > other_value else "no")


def _difference(chart: Chart) -> Iterator[Question]:
    for names in _namings(chart):
        for (one, value), (other, other_value) in combinations(zip(names, chart.values, strict=True), 2):
            yield Question(
                f"What is the difference between {one} and {other}?", str(abs(value - other_value))
            )


def _list(chart: Chart) -> Iterator[Question]:
    words = WORDS[chart.kind]
    # Where marks go round any of them can begin; elsewhere the first one does.
    for start in range(1 if words.ends else len(chart.values)):
        order = words.order.format(first=chart.colours[start])
        for name, listed in (
            ("colours", chart.colours), ("labels", chart.labels), ("values", chart.values)
        ):  # fmt: skip
            answer = ", ".join(map(str, listed[start:] + listed[:start]))
            yield Question(f"List the {name} of the {words.mark}s {order}.", answer)


_QUESTIONS: dict[str, Callable[[Chart], Iterator[Question]]] = {
    "count": _count,
    "count_above": _count_above,
    "position": _position,
    "naming": _naming,
    "extreme": _extreme,
    "highest": _highest,
    "lowest": _lowest,
    "value_by_colour": _value_by_colour,
    "value_by_label": _value_by_label,
    "comparison": _comparison,
    "difference": _difference,
    "list": _list,
}

FAMILIES: tuple[str, ...] = tuple(_QUESTIONS)
"""Names of the question families, described in the module's docstring."""


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


def _rng(*parts: object) -> random.Random:
    """Return a generator seeded by the parts alone; `hash()` would differ between processes."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


def _sample_chart(rng: random.Random, kinds: tuple[Kind, ...], *, plain: bool) -> Chart:
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


# ---------------------------------------------------------------------------------------------
# The dataset
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ChartsConfig:
    """Parameters of the dataset, as they stand in its name."""

    num_rows: int = 1000
    """Rows in every split."""

    seed: int = 0
    """Another seed is another dataset."""

    family: str | None = None
    """Only questions of these families, comma-separated, twice as many of one named twice; see `FAMILIES`."""

    kind: str | None = None
    """Only charts of these kinds, comma-separated: bar, hbar (lying bars), line, pie."""

    style: str = "varied"
    """`varied` looks, or one `plain` look for all charts, with letters for labels; see `PLAIN`."""

    questions_per_image: int = 2
    """Consecutive rows that ask about the same image."""

    def __post_init__(self) -> None:
        for name, least in (("num_rows", 1), ("seed", 0), ("questions_per_image", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"charts: {name} must be at least {least}, got {getattr(self, name)}")
        _select("family", self.family, FAMILIES)
        _select("kind", self.kind, KINDS)
        if self.style not in STYLES:
            raise ValueError(f"charts: unknown style {self.style!r}; known: {', '.join(STYLES)}")

    @property
    def families(self) -> tuple[str, ...]:
        """Families that may be asked, in the order of `FAMILIES`, each as often as it is named."""
        return _select("family", self.family, FAMILIES)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kinds that may be drawn, in the order of `KINDS`."""
        chosen = _select("kind", self.kind, KINDS)
        return tuple(kind for kind in KINDS if kind in chosen)

    @property
    def name(self) -> str:
        """The dataset name that `parse_charts_name` reads as this."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return f"charts?{urlencode(given, safe=',')}"


def _select(parameter: str, text: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    if text is None:
        return known
    chosen = [name.strip() for name in text.split(",")]
    for name in chosen:
        if name not in known:
            raise ValueError(f"charts: unknown {parameter} {name!r}; known: {', '.join(known)}")
    return tuple(sorted(chosen, key=known.index))


def parse_charts_name(name: str) -> ChartsConfig:
    """Parse a dataset name such as `charts` or `charts?num_rows=200&seed=7&family=count,extreme`.

    Raises:
        ValueError: The name does not begin with `charts`, or a parameter is unknown, repeated, or has
            a value it cannot take.
    """
    base, _, query = name.partition("?")
    if base != "charts":
        raise ValueError(f"expected a name like 'charts' or 'charts?num_rows=200&seed=7', got {name!r}")
    known = {field.name: field.default for field in fields(ChartsConfig)}
    parameters: dict[str, int | str] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in known:
            raise ValueError(f"charts: unknown parameter {key!r}; known: {', '.join(known)}")
        if key in parameters:
            raise ValueError(f"charts: parameter {key!r} is given twice; separate values by commas")
        parameters[key] = _parse_whole_number(key, value) if isinstance(known[key], int) else value
    return ChartsConfig(**parameters)  # type: ignore[arg-type]  # keys and types were checked above


def _parse_whole_number(key: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"charts: {key} must be a whole number, got {value!r}") from None


class QuestionRow(TypedDict):
    """One question."""

    question: str
    answers: list[str]
    family: str


class Row(QuestionRow):
    """One question about one chart."""

    image: bytes
    """PNG."""

    image_id: str
    """Split and image number: rows of the same image share it."""


class ChartDataset:
    """One split of the chart dataset, readable at any index.

    Splits differ in their seeds. Restricting `family` keeps the charts and changes what is asked.
    Families take turns, so each has its share of any longer stretch of rows.
    """

    def __init__(self, config: ChartsConfig, split: str) -> None:
        """Make the split's view; nothing is drawn yet.

        Raises:
            ValueError: `split` is not one of `SPLITS`.
        """
        if split not in SPLITS:
            raise ValueError(f"charts: unknown split {split!r}; known: {', '.join(SPLITS)}")
        self.config = config
        self.split = split
        # Rows of an image come in a row.
        self._chart = functools.lru_cache(maxsize=1)(self._sample)
        self._png = functools.lru_cache(maxsize=1)(self._draw)

    def __reduce__(self) -> tuple[type[ChartDataset], tuple[ChartsConfig, str]]:
        return type(self), (self.config, self.split)  # without the picture drawn last

    def __len__(self) -> int:
        return self.config.num_rows

    def __getitem__(self, index: int) -> Row:
        """Return a row.

        Raises:
            IndexError: `index` is negative or not below the number of rows.
        """
        png = self._png(self._locate(index)[0])
        return Row(image=png, image_id=self.image_id(index), **self.ask(index))

    def image_id(self, index: int) -> str:
        """Name the image of a row; rows of one image follow each other."""
        return f"{self.split}-{self._locate(index)[0]:06d}"

    def ask(self, index: int) -> QuestionRow:
        """Return what a row asks, without drawing its image."""
        image_index, slot = self._locate(index)
        family, question = self._ask(self._chart(image_index), image_index, slot)
        return QuestionRow(question=question.text, answers=[question.answer], family=family)

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def chart(self, index: int) -> Chart:
        """Return what the image of a row says, without drawing it."""
        return self._chart(self._locate(index)[0])

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"charts: row {index} is out of range, {self.split} has {len(self)} rows")
        return divmod(index, self.config.questions_per_image)

    def _sample(self, image_index: int) -> Chart:
        rng = _rng("chart", self.split, self.config.seed, image_index)
        return _sample_chart(rng, self.config.kinds, plain=self.config.style == "plain")

    def _draw(self, image_index: int) -> bytes:
        buffer = io.BytesIO()
        draw_chart(self._chart(image_index)).render().save(buffer, format="PNG")
        return buffer.getvalue()

    def _ask(self, chart: Chart, image_index: int, slot: int) -> tuple[str, Question]:
        """Choose the question of one row: its family by turn, its wording by lot.

        Images are dealt in blocks of as many as there are families. A block has its own order of
        families and each image starts one further, so every family comes up equally often and an
        image meets none twice before it has met all; then the family's next question is due. A family
        that is named several times counts as several.
        """
        families = list(self.config.families)
        count, seed = len(families), self.config.seed
        _rng("families", self.split, seed, image_index // count).shuffle(families)
        turns = [families[(image_index + turn) % count] for turn in range(slot + 1)]
        family = turns[-1]
        questions = list(_QUESTIONS[family](chart))
        _rng("question", self.split, seed, image_index, family).shuffle(questions)
        return family, questions[(turns.count(family) - 1) % len(questions)]
