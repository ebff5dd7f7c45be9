"""A page shows untrusted text as text and needs nothing but itself; texts and numbers read well."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image, ImageDraw

from vlmray.reports import page
from vlmray.reports.gallery import THUMBNAIL_MAX_BYTES, Gallery, GalleryItem, thumbnail_data_uri, verdict_of
from vlmray.reports.lanes import Lane, LanePlot
from vlmray.reports.page import Fact, Page
from vlmray.reports.plots import Plot, Series
from vlmray.reports.tables import Cell, Column, Mark, Table
from vlmray.reports.text import format_duration, format_percent, format_rate

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


def make_plot(text: str = "bar", **values: Any) -> Plot:
    """Make a plot with all there is to draw, the same text in every place there is."""
    points = tuple((float(x), x / 7 if x != 4 else math.nan) for x in range(8))
    series = (
        Series(name=text, points=points, style="faint"),
        Series(name=text, points=points, style="dots"),
        Series(name=text, points=points),
    )
    return Plot(
        **({"title": text, "x_label": text, "y_label": text, "note": text, "series": series} | values)
    )


def make_lane_plot(text: str = "bar") -> LanePlot:
    """Make a plot of two lanes, the same text in every place there is."""
    lanes = tuple(Lane(name=text, levels=(0.0, 1.0, 0.5), color=color) for color in range(2))
    return LanePlot(title=text, elapsed_s=10.0, lanes=lanes, lead=text, note=text)


def render_sections(*sections: Table | Plot | LanePlot | Gallery) -> str:
    return page.render_page(Page(title="T", headline=Fact("a", "1"), sections=sections))


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


def decode_data_uri(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def plot_of(name: str) -> Plot:
    return make_plot("loss", series=(Series(name=name, points=((0.0, 1.0), (1.0, 2.0))),))


def gallery_of(text: str) -> Gallery:
    """Make a gallery of a right and a failed answer, the same text in every place there is."""
    texts: dict[str, Any] = {"sample_id": text, "question": text, "family": text, "answers": (text,)}
    items = (make_item(prediction=text, beside=((text, text),), **texts), make_item(error=text, **texts))
    return Gallery(title=text, items=items, note=text)


def chromium_dom(path: Path, tmp_path: Path) -> str:
    """Return what a page has become once its scripts have run."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


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


# Pages


def test_untrusted_text_stays_text() -> None:
    attack = "</span></style><script>alert(1)</script><img src=x onerror=alert(2)>\" onclick='x' {{ 7*7 }}"
    texts: dict[str, Any] = {"sample_id": attack, "question": attack, "family": attack, "prediction": attack}
    items = (
        make_item(answers=(attack,), **texts),
        make_item(1, error=attack, **texts),
        make_item(2, family="b"),
    )
    reader = Reader(render(*items, text=attack))
    assert len(list(reader.find("script"))) == 1
    assert not list(reader.find("img"))
    assert not [name for _, attrs in reader.tags for name in attrs if name.startswith("on")]
    # Titles 2, headline 3, fact 3, table 8, gallery 2, family filter 1, cards 5 and 4.
    assert reader.text.count("<script>alert(1)</script>") == reader.text.count("{{ 7*7 }}") == 28


def test_control_characters_reach_neither_page_nor_terminal() -> None:
    dirty = "a\x00b\x1b[31m\ud800\x07\nnext"
    items = (make_item(prediction=dirty, family=dirty), make_item(1, error=dirty))
    table = make_table(dirty)
    for text in (render(*items, text=dirty), table.to_markdown(), table.to_text()):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", text)
        text.encode()


def test_page_needs_nothing_but_itself() -> None:
    html = render(*(make_item(index, image=encode_image((640, 480))) for index in range(5)))
    reader = Reader(html)
    for _, attrs in reader.tags:
        assert not {"style", "srcset", "href", "action"} & attrs.keys()
        assert (attrs.get("src", "data:image/") or "").startswith("data:image/")
    assert not re.search(r"(https?:)?//[a-z]|@import|url\(", re.sub(r"data:image/[^\"]*", "", html))
    assert len(list(reader.find("img"))) == 5
    assert all(attrs.get("alt") for attrs in reader.find("img"))


def test_policy_allows_exactly_the_inline_style_and_script() -> None:
    html = render(make_item())
    policy = next(attrs for attrs in Reader(html).find("meta") if attrs.get("http-equiv"))["content"] or ""
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on PATH")
def test_browser_runs_the_script_under_the_policy(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(render(make_item(), make_item(1, score=0.0)), encoding="utf-8")
    dom = chromium_dom(path, tmp_path)
    # The filters are hidden in the file; only the script, if the policy lets it run, shows them.
    (filters,) = [attrs for attrs in Reader(dom).find("div") if attrs.get("class") == "filters"]
    assert "hidden" not in filters


HOSTILE = ("W" * 300, "a_long_name/" * 30, "many words " * 60, "No significant change")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on PATH")
def test_a_phone_need_not_scroll_sideways(tmp_path: Path) -> None:
    pages = [
        page.render_page(
            Page(
                title=text,
                headline=Fact(text, text, text),
                facts=(Fact(text, text, text),),
                sections=(make_table(text), plot_of(text), make_lane_plot(), gallery_of(text)),
            )
        )
        for text in HOSTILE
    ]
    frames = "".join(
        f'<iframe width="390" height="30000" srcdoc="{escape(text)}"></iframe>' for text in pages
    )
    path = tmp_path / "frames.html"
    path.write_text(
        f"""<meta charset="utf-8">{frames}<p></p><script>onload = () => {{
        const widths = [...document.querySelectorAll("iframe")].map((frame) =>
            frame.contentDocument.documentElement.scrollWidth);
        document.querySelector("p").textContent = widths;}}</script>""",
        encoding="utf-8",
    )
    widths = re.findall(r"<p>([\d,]+)</p>", chromium_dom(path, tmp_path))
    assert widths == [",".join(["390"] * len(HOSTILE))]


def test_every_colour_is_there_in_both_themes() -> None:
    (css,) = re.findall(r"<style>(.*?)</style>", render_sections(make_plot()), re.DOTALL)
    dark = "".join(re.findall(r"\(prefers-color-scheme: dark\) \{\s*:root \{(.*?)\}", css, re.DOTALL))
    colours = [set(re.findall(r"(--\w+): #", text)) for text in (css, dark)]
    assert colours[0] == colours[1]
    assert {"--bar", "--c1", "--c4", "--ink", "--paper"} <= colours[0]
    assert set(re.findall(r"var\((--\w+)\)", css)) == {*colours[0], "--hue", "--dim"}
    outside = re.sub(r":root \{.*?\}", "", css, flags=re.DOTALL)
    assert set(re.findall(r"#[0-9a-f]{3,8}\b", outside)) <= {"#ffffff"}  # the plate of an image


def test_long_names_may_break_after_underscores_and_slashes() -> None:
    html = render(make_item(), text="a_b/c<d")
    assert '<th scope="row">a_<wbr>b/<wbr>c&lt;d</th>' in html


# Galleries


def test_verdicts() -> None:
    assert [verdict_of(score, None) for score in (0.0, 0.5, 1.0, None)] == [
        "wrong",
        "partial",
        "right",
        "unscored",
    ]
    assert verdict_of(1.0, "E") == "failed"


def test_full_gallery_of_hard_images_stays_small() -> None:
    uri = thumbnail_data_uri(encode_image((700, 500), noise=True)) or ""
    html = render(*(make_item(index, prediction="x" * 20_000) for index in range(60)))
    # The same thumbnail 60 times, counted without encoding it 60 times.
    assert len(html.encode()) + 60 * len(uri) < 4_000_000
    assert "16,000 more characters in the result files" in html


def test_text_alone_gets_no_empty_image_places() -> None:
    assert "No image" not in Reader(render(make_item())).text
    assert "No image" in Reader(render(make_item(), make_item(1, image=encode_image((80, 60))))).text


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(encode_image((2000, 1200)), id="flat chart"),
        pytest.param(encode_image((900, 700), noise=True), id="noise"),
        pytest.param(encode_image((60, 4000), noise=True), id="tall"),
        pytest.param(encode_image((1, 1), mode="L"), id="one pixel"),
    ],
)
def test_thumbnails_are_bounded(image: bytes) -> None:
    uri = thumbnail_data_uri(image)
    assert uri is not None
    assert len(uri) <= THUMBNAIL_MAX_BYTES * 4 / 3 + 40
    thumbnail = decode_data_uri(uri)
    assert thumbnail.width <= 480
    assert thumbnail.height <= 720


def test_transparent_pixels_become_white() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(buffer, "PNG")
    uri = thumbnail_data_uri(buffer.getvalue())
    assert uri is not None
    assert decode_data_uri(uri).convert("RGB").getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("image", [b"", b"not an image", encode_image((300, 300), noise=True)[:500]])
def test_unreadable_images_are_named(image: bytes) -> None:
    assert thumbnail_data_uri(image) is None
    assert "The image cannot be read" in Reader(render(make_item(image=image))).text


# Plots


def read_svg(html: str) -> list[ElementTree.Element]:
    """Parse the pictures of all plots as XML."""
    charts = re.findall(r'<svg class="plot.*?</svg>\s*</div>', html, re.DOTALL)
    return [ElementTree.fromstring(chart.removesuffix("</div>").strip()) for chart in charts]


def test_a_plot_is_a_picture_with_a_name_and_a_description() -> None:
    html = render_sections(make_plot("a"), make_table(), make_plot("b", collapsed=True), make_lane_plot("c"))
    pictures = read_svg(html)
    assert len(pictures) == 3
    for picture in pictures:
        assert picture.get("role") == "img"
        name, description = picture.findall("title") + picture.findall("desc")
        assert (picture.get("aria-labelledby"), picture.get("aria-describedby")) == (
            name.get("id"),
            description.get("id"),
        )
        assert re.search("[78] values|at work", description.text or "")
    ids = [attrs["id"] for _, attrs in Reader(html).tags if "id" in attrs]
    assert len(ids) == len(set(ids)) == 6


def test_texts_of_a_plot_stay_text() -> None:
    attack = "</svg></title><script>alert(1)</script><b onclick='x'>\" & ]]> {{ 7*7 }} \x00"
    html = render_sections(make_plot(attack), make_lane_plot(attack))
    reader = Reader(html)
    assert len(list(reader.find("script"))) == 1
    assert not list(reader.find("b"))
    assert not [name for _, attrs in reader.tags for name in attrs if name.startswith("on")]
    for picture in read_svg(html):
        assert attack.replace("\x00", "\ufffd") in {text.strip() for text in picture.itertext()}


def test_a_plot_needs_no_network_and_no_style_of_its_own() -> None:
    html = render_sections(make_plot(), make_lane_plot())
    for _, attrs in Reader(html).tags:
        assert not {"style", "href", "src", "xlink:href", "fill", "stroke"} & attrs.keys()
    assert not re.search(r"//[a-z]|url\(|@import", html)


def test_values_of_a_plot_are_listed_below_it() -> None:
    (plotted,) = re.findall(
        r'<details class="fold values">(.*?)</details>', render_sections(make_plot()), re.DOTALL
    )
    assert plotted.count("<tr>") == 9  # the heading and eight values
    assert "0.2857" in plotted
    assert plotted.count("NaN") == 3


def test_long_series_make_small_pages() -> None:
    rng = random.Random(0)
    series = tuple(
        Series(
            name=f"s{number}",
            points=tuple((step, rng.random()) for step in range(20_000)),
            style="dots",
        )
        for number in range(5)
    )
    html = render_sections(make_plot(series=series))
    assert len(html) < 130_000
    (picture,) = read_svg(html)
    assert len(picture.findall(".//path")) == 5


def test_a_plot_without_values_says_so() -> None:
    html = render_sections(
        make_plot(series=()), make_plot(series=(Series(name="s", points=((0, math.inf),)),))
    )
    assert not read_svg(html)
    assert Reader(html).text.count("No finite values to show.") == 2


def test_lanes_stand_below_what_to_take_away_from_them() -> None:
    html = render_sections(make_lane_plot("a lane"))
    assert html.index('<p class="below">a lane</p>') < html.index('<svg class="plot lanes"')
    assert "fold values" not in html
    (picture,) = read_svg(html)
    assert len(picture.findall(".//path")) == 4  # two tracks, two lanes


def test_plots_in_a_row_share_it() -> None:
    html = render_sections(make_plot(), make_plot(), make_table(), make_plot(collapsed=True), make_plot())
    assert html.count('<div class="plots">') == 2
    assert [attrs.get("class") for attrs in Reader(html).find("section")].count("folded") == 1


# Tables and numbers


def test_a_mark_is_a_word_and_a_sign() -> None:
    table = Table(title="T", columns=(Column("a"), Column("b")), rows=(("x", Mark("wrong", "failed")),))
    assert "✕ failed" in Reader(render_sections(table)).text
    assert "failed" in table.to_text()
    assert not table.is_barred(1)


def test_one_table_three_ways() -> None:
    table = Table(
        title="T",
        columns=(Column("name"), Column("score", numeric=True)),
        rows=(("a|b", Cell("50.0 %", 0.5)),),
    )
    assert table.to_markdown() == "| name | score |\n| --- | ---: |\n| a\\|b | 50.0 % |"
    assert table.to_text() == "name   score\n----  ------\na|b   50.0 %"


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0.0 %"), (1e-5, "<0.1 %"), (0.5, "50.0 %"), (0.99999, ">99.9 %"), (1, "100.0 %"), (None, "–")],
)
def test_percent_never_rounds_to_all_or_nothing(share: float | None, text: str) -> None:
    assert format_percent(share) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00 s"),
        (9.994, "9.99 s"),
        (9.999, "10.0 s"),
        (59.96, "1 min 0 s"),
        (119.7, "2 min 0 s"),
        (7260, "2 h 1 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(None, "–"), (0.0123, "0.0123"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,234")]
)
def test_rates(rate: float | None, text: str) -> None:
    assert format_rate(rate) == text
