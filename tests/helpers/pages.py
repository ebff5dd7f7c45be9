"""Pages with a bit of everything, and a reader of HTML."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

from PIL import Image, ImageDraw

from vlmray.reports import page
from vlmray.reports.gallery import Gallery, GalleryItem
from vlmray.reports.page import Fact, Page
from vlmray.reports.tables import Cell, Column, Table

VOID_TAGS = {"meta", "img", "wbr", "br", "link", "rect"}


def make_item(index: int = 0, **values: Any) -> GalleryItem:
    defaults: dict[str, Any] = {
        "sample_id": f"test-{index:06d}",
        "question": "Which bar is the largest?",
        "score": 1.0,
    }
    return GalleryItem(**(defaults | values))


def make_table(text: str = "bar") -> Table:
    columns = (Column(text), Column(text, numeric=True), Column(text))
    return Table(title=text, columns=columns, rows=((text, Cell(text, 0.5), text),), note=text)


def render(*items: GalleryItem, text: str = "bar") -> str:
    """Render a page with a table and a gallery, the same text in every place there is."""
    gallery = Gallery(title=text, items=items, note=text)
    fact = Fact(text, text, text)
    return page.render_page(
        Page(title=text, headline=fact, facts=(fact,), sections=(make_table(text), gallery))
    )


def encode_image(size: tuple[int, int], *, noise: bool = False, mode: str = "RGB") -> bytes:
    if noise:
        data = random.Random(0).randbytes(size[0] * size[1] * len(mode))
        image = Image.frombytes(mode, size, data)
    else:
        image = Image.new(mode, size)
        ImageDraw.Draw(image).rectangle((10, 10, 60, 50), fill="red")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID_TAGS:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in {"script", "style"}:
            self.texts.append(data)

    def find(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attrs for name, attrs in self.tags if name == tag)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())
