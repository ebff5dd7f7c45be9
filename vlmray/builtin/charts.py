"""The built-in synthetic chart dataset: small drawn charts whose answers are known by construction.

    'charts?num_rows=200&seed=7' -> ChartsConfig -> ChartDataset -> rows (image, question, answers)

Nothing is stored or downloaded. A row is a pure function of the config, the split and its index: any
row can be read alone, in any order, by any worker, and is the same on each. `num_rows` only says
where a split ends. Charts are chosen in `random_charts.py`,
drawn in `drawing.py` and asked about in `questions.py`.

Question families, all of which apply to every kind of chart; `record` is asked only where `family` names it:

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
| `record` | label, colour and value of the mark with a colour | JSON, for `field_accuracy` |

Byte-identical images need the same Pillow release everywhere; questions and answers do not.
"""

from __future__ import annotations

import functools
import hashlib
import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypedDict
from urllib.parse import parse_qsl, urlencode

from vlmray.builtin.canvas import Chart, Kind
from vlmray.builtin.drawing import DRAWERS, draw_chart
from vlmray.builtin.questions import FAMILIES, QUESTIONS, Question
from vlmray.builtin.random_charts import STYLES, sample_chart
from vlmray.errors import mistake_in
from vlmray.storage.fingerprints import digest

SPLITS = ("train", "validation", "test")
KINDS: tuple[Kind, ...] = tuple(DRAWERS)

VERSION = 1
"""Raise it whenever any row changes, be it in its chart, its question or its answer."""


def _rng(*parts: object) -> random.Random:
    """Return a generator seeded by the parts alone; `hash()` would differ between processes."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


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
        _ = self.families
        _select("kind", self.kind, KINDS)
        if self.style not in STYLES:
            raise ValueError(f"charts: unknown style {self.style!r}; known: {', '.join(STYLES)}")

    @property
    def families(self) -> tuple[str, ...]:
        """Families that may be asked, in the order of `QUESTIONS`, each as often as it is named."""
        return FAMILIES if self.family is None else _select("family", self.family, (*QUESTIONS,))

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

    @property
    def title(self) -> str:
        """What the dataset is called where people read it."""
        return f"Built-in charts, {self.num_rows:,} row{'' if self.num_rows == 1 else 's'}"


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


class ChartRow(QuestionRow):
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

    def __getitem__(self, index: int) -> ChartRow:
        """Return a row.

        Raises:
            IndexError: `index` is negative or not below the number of rows.
        """
        png = self._png(self._locate(index)[0])
        return ChartRow(image=png, image_id=self.image_id(index), **self.ask(index))

    def image_id(self, index: int) -> str:
        """Name the image of a row; rows of one image follow each other."""
        return f"{self.split}-{self._locate(index)[0]:06d}"

    def ask(self, index: int) -> QuestionRow:
        """Return what a row asks, without drawing its image."""
        image_index, slot = self._locate(index)
        family, question = self._ask(self._chart(image_index), image_index, slot)
        return QuestionRow(question=question.text, answers=[question.answer], family=family)

    def __iter__(self) -> Iterator[ChartRow]:
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
        return sample_chart(rng, self.config.kinds, plain=self.config.style == "plain")

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
        questions = list(QUESTIONS[family](chart))
        _rng("question", self.split, seed, image_index, family).shuffle(questions)
        return family, questions[(turns.count(family) - 1) % len(questions)]


class ChartsSource:
    """The built-in charts: drawn where they are read, so they lie nowhere."""

    column_names = ("image", "image_id", "question", "answers", "family")
    on_driver = False
    base_dir = None
    same_image_column = "image_id"

    def __init__(self, name: str, split: str) -> None:
        with mistake_in("dataset_name"):
            config = parse_charts_name(name)
        with mistake_in("dataset_split"):
            self._charts = ChartDataset(config, split)

    def __len__(self) -> int:
        return len(self._charts)

    def fingerprint(self) -> str:
        """Return 16 hex digits of all that decides what the rows are."""
        return digest(VERSION, self._charts.config.name, self._charts.split)

    def count_filled(self, column: str) -> int:
        """Count the rows that have a value in a column: all."""
        return len(self)

    def read(self, indices: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Draw the charts of some rows, or only word their questions if no image is asked for."""
        charts = self._charts
        if columns is None or "image" in columns:
            rows = [dict(charts[index]) for index in indices]
        elif list(columns) == ["image_id"]:
            rows = [{"image_id": charts.image_id(index)} for index in indices]
        else:  # nothing has to be drawn
            rows = [{"image_id": charts.image_id(index), **charts.ask(index)} for index in indices]
        return [{name: row[name] for name in columns or row} for row in rows]
