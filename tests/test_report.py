"""The report says what the rows say, shows untrusted text as text and needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from vlmray import report
from vlmray.report import Cell, Column, GalleryItem, Report, Table

VOID_TAGS = {"meta", "img", "wbr", "br", "link", "rect"}


def make_row(
    index: int, *, score: float | None = 1.0, error: str | None = None, **values: Any
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "sample_id": f"test-{index:06d}",
        "family": "human",
        "question": "Which bar is the largest?",
        "answers": ["42"],
        "prediction": None if error else "42",
        "score": None if error else score,
        "error": error,
        "num_prompt_tokens": None if error else 400,
        "num_completion_tokens": None if error else 5,
    }
    return row | values


def mixed_rows(num_rows: int = 90) -> list[dict[str, Any]]:
    """Wrong, failed and right rows in equal parts, over three families."""
    families = ("human", "augmented", None)
    rows = []
    for index in range(num_rows):
        error = f"ImageError: no image 'x{index}.png'" if index % 3 == 1 else None
        rows.append(make_row(index, score=index % 3 / 2, error=error, family=families[index // 3 % 3]))
    return rows


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


def make_report(rows: list[dict[str, Any]], **values: Any) -> Report:
    summary = report.summarize(rows, metric=values.pop("metric", "relaxed_accuracy"), elapsed_s=10.0)
    gallery = tuple(GalleryItem.from_row(row) for row in report.choose_gallery(rows))
    defaults: dict[str, Any] = {"errors": report.group_errors(rows), "gallery": gallery}
    return Report(title="tiny on charts", summary=summary, **(defaults | values))


class Page(HTMLParser):
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


# Summary


def test_summary_counts_every_row_once() -> None:
    summary = report.summarize(mixed_rows(), metric="relaxed_accuracy", elapsed_s=10.0)
    assert (summary.num_rows, summary.num_answered, summary.num_failed) == (90, 60, 30)
    assert summary.score == 0.5
    assert summary.score_with_failures == pytest.approx(1 / 3)
    assert [family.name for family in summary.families] == ["augmented", "human", report.NO_FAMILY]
    for name in ("num_rows", "num_answered", "num_failed", "num_scored"):
        assert sum(getattr(family, name) for family in summary.families) == getattr(summary, name)


def test_summary_does_not_depend_on_row_order() -> None:
    rows = mixed_rows()
    shuffled = random.Random(0).sample(rows, len(rows))
    summary = report.summarize(rows, metric="m", elapsed_s=1.0)
    assert report.summarize(shuffled, metric="m", elapsed_s=1.0) == summary


def test_rates_leave_out_earlier_runs_and_failed_rows() -> None:
    rows = [make_row(index) for index in range(10)] + [make_row(10, error="ValueError: empty question")]
    resumed = {row["sample_id"] for row in rows[:6]}
    summary = report.summarize(rows, metric="m", elapsed_s=2.0, resumed_ids=resumed)
    assert (summary.num_resumed, summary.num_answered) == (6, 10)
    assert summary.samples_per_s == 2.0
    assert summary.tokens_per_s == 10.0
    assert summary.num_completion_tokens == 50


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_rows_without_a_score_are_left_out_of_the_mean(missing: float | None) -> None:
    rows = [make_row(0, score=1.0), make_row(1, score=0.0), make_row(2, score=missing, answers=[])]
    summary = report.summarize(rows, metric="m", elapsed_s=1.0)
    assert (summary.score, summary.num_scored, summary.num_answered) == (0.5, 2, 3)
    assert "1 answered without a score" in report.format_table(summary)


def test_a_failed_row_without_answers_is_no_wrong_answer() -> None:
    rows = [make_row(0), make_row(1, error="E", answers=[]), make_row(2, error="E")]
    assert report.summarize(rows, metric="m", elapsed_s=1.0).score_with_failures == 0.5


@pytest.mark.parametrize("rows", [[], [make_row(0, error="E")], [make_row(0, score=None)]])
@pytest.mark.parametrize("metric", ["relaxed_accuracy", None])
@pytest.mark.parametrize("elapsed_s", [0.0, 3.0])
def test_nothing_to_divide_by(rows: list[dict[str, Any]], metric: str | None, elapsed_s: float) -> None:
    summary = report.summarize(rows, metric=metric, elapsed_s=elapsed_s)
    assert summary.score is None
    assert "rows in" in report.format_table(summary)
    built = make_report(rows, metric=metric, stages={"read": 0.0}, options={})
    assert "tiny on charts" in Page(report.render_html(built)).text
    assert report.render_markdown(built).startswith("# tiny on charts")


def test_no_families_no_family_table() -> None:
    summary = report.summarize([make_row(0, family=None)], metric="m", elapsed_s=1.0)
    assert summary.families == ()
    assert report.NO_FAMILY not in report.format_table(summary)


# Errors


def test_errors_group_by_cause_and_add_up() -> None:
    traceback = 'Traceback (most recent call last):\n  File "x.py", line 3\nTimeoutError: none after 3.5 s'
    rows = [
        make_row(index, error=f"ImageError: test-{index:06d}: no image '/data/{index}.png'")
        for index in range(5)
    ]
    rows += [make_row(7, error=traceback), make_row(8, error="TimeoutError: none after 20 s"), make_row(9)]
    rows += [make_row(6, error=" \n")]
    groups = report.group_errors(reversed(rows))
    assert [group.cause for group in groups] == [
        "ImageError: …: no image …",
        "TimeoutError: none after … s",
        "no message",
    ]
    assert [group.num_rows for group in groups] == [5, 2, 1]
    assert groups[0].sample_ids[0] == "test-000000"
    assert groups[0].example.endswith("'/data/0.png'")


def test_one_message_is_shown_as_it_is() -> None:
    (group,) = report.group_errors([make_row(0, error="ImageError: no image 'a.png'")])
    assert group.cause == "ImageError: no image 'a.png'"


# Gallery


def test_gallery_order_and_spread() -> None:
    rows = mixed_rows()
    chosen = report.choose_gallery(random.Random(3).sample(rows, len(rows)), limit=30)
    verdicts = [report.verdict_of(row["score"], row["error"]) for row in chosen]
    assert verdicts == ["wrong"] * 15 + ["failed"] * 6 + ["right"] * 9
    for families in ([row["family"] for row in chosen[:15]], [row["family"] for row in chosen[15:21]]):
        assert len({families.count(name) for name in ("human", "augmented", None)}) == 1
    assert chosen == report.choose_gallery(rows, limit=30)


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 60, 500])
def test_gallery_fills_its_places(limit: int) -> None:
    for rows in (mixed_rows(), [make_row(index) for index in range(90)]):
        chosen = report.choose_gallery(rows, limit=limit)
        assert len(chosen) == min(limit, 90)
        assert len({row["sample_id"] for row in chosen}) == len(chosen)


def test_verdicts() -> None:
    assert [report.verdict_of(score, None) for score in (0.0, 0.5, 1.0, None)] == [
        "wrong",
        "partial",
        "right",
        "unscored",
    ]
    assert report.verdict_of(1.0, "E") == "failed"


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
    uri = report.thumbnail_data_uri(image)
    assert uri is not None
    assert len(uri) <= report.THUMBNAIL_MAX_BYTES * 4 / 3 + 40
    thumbnail = decode_data_uri(uri)
    assert thumbnail.width <= 480
    assert thumbnail.height <= 720


def test_transparent_pixels_become_white() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(buffer, "PNG")
    uri = report.thumbnail_data_uri(buffer.getvalue())
    assert uri is not None
    assert decode_data_uri(uri).convert("RGB").getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("image", [b"", b"not an image", encode_image((300, 300), noise=True)[:500]])
def test_unreadable_images_are_named(image: bytes) -> None:
    assert report.thumbnail_data_uri(image) is None
    built = make_report([make_row(0)], gallery=(GalleryItem.from_row(make_row(0), image),))
    assert "The image cannot be read" in Page(report.render_html(built)).text


# Page


def test_untrusted_text_stays_text() -> None:
    attack = "</span></style><script>alert(1)</script><img src=x onerror=alert(2)>\" onclick='x' {{ 7*7 }}"
    texts = {
        "question": attack,
        "prediction": attack,
        "answers": [attack],
        "family": attack,
        "sample_id": attack,
    }
    rows = [make_row(0, **texts), make_row(1, error=attack, **texts), make_row(2, score=0.3, family="b")]
    built = make_report(rows, metric=attack, options={attack: attack}, stages={attack: 1.0})
    html = report.render_html(built)
    page = Page(html)
    assert len(list(page.find("script"))) == 1
    assert not list(page.find("img"))
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text


def test_control_characters_do_not_reach_page_or_terminal() -> None:
    rows = [make_row(0, prediction="a\x00b\x1b[31m\ud800\nnext", family="f\x1b[2J")]
    rows += [make_row(1, error="E\ud800\x1b")]
    built = make_report(rows, options={"x": "\x07"})
    for text in (
        report.render_html(built),
        report.render_markdown(built),
        report.render_json(built),
        report.format_table(built.summary),
    ):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", text)
        text.encode()


def test_page_needs_nothing_but_itself() -> None:
    rows = mixed_rows()
    gallery = tuple(
        GalleryItem.from_row(row, encode_image((640, 480))) for row in report.choose_gallery(rows)
    )
    html = report.render_html(make_report(rows, gallery=gallery, stages={"read": 1.0}, options={"a": 1}))
    page = Page(html)
    for _, attrs in page.tags:
        assert not {"style", "srcset", "href", "action"} & attrs.keys()
        assert (attrs.get("src", "data:image/") or "").startswith("data:image/")
    assert not re.search(r"(https?:)?//[a-z]|@import|url\(", re.sub(r"data:image/[^\"]*", "", html))
    assert len(list(page.find("img"))) == 60
    assert all(attrs.get("alt") for attrs in page.find("img"))


def test_policy_allows_exactly_the_inline_style_and_script() -> None:
    html = report.render_html(make_report(mixed_rows()))
    policy = next(attrs for attrs in Page(html).find("meta") if attrs.get("http-equiv"))["content"] or ""
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_full_gallery_of_hard_images_stays_small() -> None:
    image = encode_image((700, 500), noise=True)
    rows = [make_row(index, prediction="x" * 20_000, score=0.0) for index in range(60)]
    items = tuple(GalleryItem.from_row(row) for row in rows)
    uri = report.thumbnail_data_uri(image) or ""
    html = report.render_html(make_report(rows, gallery=items))
    # The same thumbnail 60 times, counted without encoding it 60 times.
    assert len(html.encode()) + 60 * len(uri) < 4_000_000
    assert "16,000 more characters in the result files" in html


def test_page_says_what_happened() -> None:
    built = make_report(
        mixed_rows(), options={"hf_token": "hf_abc", "max_new_tokens": 512}, stages={"read": 75.0}
    )
    text = Page(report.render_html(built)).text
    for expected in (
        "50.0 %",
        "relaxed_accuracy, mean over 60 scored of 90 rows",
        "33.3 % if failed rows count as wrong.",
        "1 min 15 s",
        "60 of 90 rows",
        "max_new_tokens",
    ):
        assert expected in text
    everything = report.render_html(built) + report.render_markdown(built) + report.render_json(built)
    assert "hf_abc" not in everything


def test_text_alone_gets_no_empty_image_places() -> None:
    assert "No image" not in Page(report.render_html(make_report([make_row(0)]))).text


def test_json_is_the_summary() -> None:
    built = make_report(mixed_rows(), options={"output_dir": Path("out")})
    content = json.loads(report.render_json(built))
    assert content["summary"]["score"] == built.summary.score
    assert content["summary"]["families"][0]["name"] == "augmented"
    assert content["errors"][0]["num_rows"] == 30
    assert content["options"] == {"output_dir": "out"}


# Tables and numbers


@pytest.mark.parametrize("name", ["a" * 300, "图表" * 60, "two words " * 30, "e\u0301" * 200, "line\nbreak"])
@pytest.mark.parametrize("metric", ["m", "an_extremely_long_name_of_a_metric_that_someone_made_up", None])
def test_closing_table_fits_the_terminal(name: str, metric: str | None) -> None:
    rows = [make_row(index, family=name) for index in range(1200)] + [make_row(1200, family="b", error="E")]
    table = report.format_table(report.summarize(rows, metric=metric, elapsed_s=12345.6))
    lines = table.splitlines()
    assert max(map(report._display_width, lines)) <= report.TERMINAL_WIDTH
    assert lines[4].split()[:4] == ["all", "1,201", "1,200", "1"]
    assert "1,201 rows in = 1,200 answered + 1 failed" in table


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
    assert report.format_percent(share) == text


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
    assert report.format_duration(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(None, "–"), (0.0123, "0.0123"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,234")]
)
def test_rates(rate: float | None, text: str) -> None:
    assert report.format_rate(rate) == text


# In a browser


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on PATH")
def test_browser_runs_the_script_under_the_policy(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(report.render_html(make_report(mixed_rows())), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    # The filters are hidden in the file; only the script, if the policy lets it run, shows them.
    (filters,) = [attrs for attrs in Page(dom).find("div") if attrs.get("class") == "filters"]
    assert "hidden" not in filters
