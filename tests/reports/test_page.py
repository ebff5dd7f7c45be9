"""A page shows untrusted text as text and needs nothing but itself; texts and numbers read well."""

from __future__ import annotations

import base64
import hashlib
import math
import random
import re
import shutil
import subprocess
from html import escape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from helpers.pages import Reader, encode_image, make_item, make_table, render
from vlmray.reports import page
from vlmray.reports.gallery import Gallery
from vlmray.reports.lanes import Lane, LanePlot
from vlmray.reports.page import Fact, Page
from vlmray.reports.plots import Plot, Series
from vlmray.reports.tables import Cell, Column, Mark, Table


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
    html = render(*(make_item(index, images=(encode_image((640, 480)),)) for index in range(5)))
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


def test_a_mark_is_a_word_and_a_sign() -> None:
    table = Table(title="T", columns=(Column("a"), Column("b")), rows=(("x", Mark("wrong", "failed")),))
    assert "✕ failed" in Reader(render_sections(table)).text
    assert "failed" in table.to_text()
    assert not table.is_barred(1)


def test_a_text_among_bars_stands_in_line_with_their_numbers() -> None:
    table = Table(
        title="T",
        columns=(Column("a"), Column("b", numeric=True)),
        rows=(("x", "75 %"), ("y", Cell("5 % (1–9)", 0.05, (0.01, 0.09))), ("z", Cell("none"))),
    )
    cells = Reader(render_sections(table)).find("td")
    assert [attrs["class"] for attrs in cells] == ["num barred ranged"] * 3
