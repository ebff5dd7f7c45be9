"""What others may read: no path of this machine, no key."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmray.publishing.private import public_text, public_value, without_secrets

KEY = "correct-horse-battery"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", KEY)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("charts?num_rows=4&kind=bar", "charts?num_rows=4&kind=bar"),
        ("hf://datasets/owner/name/*.parquet", "hf://datasets/owner/name/*.parquet"),
        ("{question}\nAnswer yes/no.", "{question}\nAnswer yes/no."),
        ("/no_think", "/no_think"),
        ("/home/jane/models/mine", "mine"),
        ("~/models/mine/", "mine"),
        ("../jane/photos.jsonl", "photos.jsonl"),
        ("file:///home/jane/a.parquet", "a.parquet"),
        ("base=builtin,tuned=builtin+/home/jane/adapter", "base=builtin,tuned=builtin+adapter"),
        ("s3://id:secret@bucket/a/b.parquet?endpoint=x", "…/b.parquet"),
        ("http://me:secret@10.0.0.1:8000/v1", "URL"),
        (f"told as {KEY}", "told as (hidden)"),
        ("hf_abcdefghijklmnopqrst", "(hidden)"),
        ({"hub_token": "x", "n": [1]}, {"hub_token": "(hidden)", "n": [1]}),
        ([{"api_key": "y"}], [{"api_key": "(hidden)"}]),
        (0.5, 0.5),
    ],
)  # fmt: skip
def test_values(value: object, expected: object) -> None:
    assert public_value(value) == expected


def test_a_path_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert public_value("owner/name") == "owner/name"
    monkeypatch.chdir(tmp_path)
    assert public_value("owner/name") == "name"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cannot open '/data/jane/a.png': no such file", "cannot open 'a.png': no such file"),
        (r"cannot open C:\Users\jane\a.png", "cannot open a.png"),
        ("HTTP 404 for https://me:secret@host/x?sig=1", "HTTP 404 for URL"),
        ("1/2 of the rows, and/or 3 / 4", "1/2 of the rows, and/or 3 / 4"),
    ],
)
def test_texts(text: str, expected: str) -> None:
    assert public_text(text) == expected


def test_folders_and_keys_of_this_machine() -> None:
    text = without_secrets(f"{Path.home()}/Jane Doe/x and {Path.cwd()}/y, {KEY}")
    assert text == "…/Jane Doe/x and …/y, (hidden)"
