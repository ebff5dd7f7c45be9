"""What is written is what is read: questions and answers are texts, whatever they look like."""

from __future__ import annotations

import csv
import datetime
import decimal
import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.datasets import mistake, png
from vlmray.config import FinetuneConfig, QuestionsConfig
from vlmray.dataset.registry import DatasetSpec
from vlmray.dataset.rows import read_rows
from vlmray.dataset.selection import open_selection
from vlmray.dataset.sources import open_source
from vlmray.dataset.text.values import as_text, parse_json
from vlmray.training.samples import Conversations

SPEC = DatasetSpec(question_column="question", image_column="image", answer_column="answer")

AS_WRITTEN = [
    "007", "012", "NA", "None", "null", "nan", "N/A", "2020-01-01", "4", "0.5", "four", "1.10", "1e3", "true",
    "True", "12345678901234567890", "1,000", "50%", " 4 ", "a;b", 'say "no"', "two\nlines", "é 中 \u2028 x",
    "'", "1_000", "0x1F", "+5", "1.", "-0", "inf", "#5", "[1, 2]", "{}",
]  # fmt: skip


def _write_delimited(path: Path, answers: list[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(["image", "question", "answer"])
        writer.writerows(["p.png", f"What of {answer}?", answer] for answer in answers)


def _write_json(path: Path, answers: list[str]) -> None:
    rows = [{"image": "p.png", "question": f"What of {answer}?", "answer": answer} for answer in answers]
    text = json.dumps(rows, indent=1) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
    path.write_text(text, encoding="utf-8")


def _file(folder: Path, suffix: str, answers: list[str]) -> str:
    path = folder / f"rows{suffix}"
    (_write_json if suffix.startswith(".json") else _write_delimited)(path, answers)
    (folder / "p.png").write_bytes(png(1))
    return str(path)


def _uri(folder: Path, suffix: str, answers: list[str]) -> str:
    return Path(_file(folder, suffix, answers)).as_uri()


def _folder(folder: Path, suffix: str, answers: list[str]) -> str:
    """Two files of a split in a folder, beside another split."""
    (folder / "data").mkdir()
    half = len(answers) // 2
    for name, part in (("test-0", answers[:half]), ("test-1", answers[half:]), ("train-0", ["x"])):
        path = Path(_file(folder / "data", suffix, part))
        path.rename(path.with_name(f"{name}{suffix}"))
    return str(folder / "data")


def _image_folder(folder: Path, suffix: str, answers: list[str]) -> str:
    """Images with metadata beside them."""
    (folder / "pictures" / "test").mkdir(parents=True)
    path = Path(_file(folder / "pictures" / "test", suffix, answers))
    text = path.read_text(encoding="utf-8").replace("image", "file_name")
    path.with_name(f"metadata{suffix}").write_text(text, encoding="utf-8")
    path.unlink()
    return str(folder / "pictures")


@pytest.mark.parametrize(
    ("write", "suffix"),
    [
        *itertools.product([_file, _uri, _folder], [".csv", ".tsv", ".jsonl", ".json"]),
        (_image_folder, ".csv"),
        (_image_folder, ".jsonl"),
    ],
)
def test_answers_are_as_written(
    write: Callable[[Path, str, list[str]], str], suffix: str, tmp_path: Path
) -> None:
    """To score with and to train on alike, and the image of each row is found."""
    name = write(tmp_path, suffix, AS_WRITTEN)
    selection = open_selection(QuestionsConfig(dataset_name=name), "test", "[:]")
    rows = read_rows(selection.source, selection.spec, "test", selection.selected)
    assert [row["error"] for row in rows] == [None] * len(rows)
    assert [row["answers"] for row in rows] == [[answer] for answer in AS_WRITTEN]
    assert [row["question"] for row in rows] == [f"What of {answer}?" for answer in AS_WRITTEN]
    if not name.startswith("file:"):
        assert all(row["images"] == [png(1)] for row in rows)
    options = {"source": selection.source, "spec": selection.spec, "split": "test"}
    trained = Conversations(turns=[[index] for index in selection.selected], **options).read(
        [*range(len(rows))]
    )
    messages = [json.loads(row["messages"]) for row in trained]
    assert [each[-1]["content"][0]["text"] for each in messages] == AS_WRITTEN


@pytest.mark.parametrize(
    ("literal", "expected"),
    [
        ("4", ["4"]), ("1.10", ["1.10"]), ("1.23e+19", ["1.23e+19"]), ("1E5", ["1E5"]), ("-0.0", ["-0.0"]),
        ("12345678901234567890", ["12345678901234567890"]), ("true", ["true"]), ("false", ["false"]),
        ("null", []), ("NaN", []), ("[]", []), ('["4", 5, 0.50, null]', ["4", "5", "0.50"]),
        ('{"answer": 1.0}', ["1.0"]), ('[{"answer": "a"}, {"answer": 2}]', ["a", "2"]), ('""', [""]),
        ('"2020-01-01T00:00:00"', ["2020-01-01T00:00:00"]),
    ],
)  # fmt: skip
def test_literals_of_json(literal: str, expected: list[str], tmp_path: Path) -> None:
    """Beside rows of other types, in either order."""
    path = tmp_path / "rows.jsonl"
    row = f'{{"image": "p.png", "question": "q?", "answer": {literal}}}'
    others = ['{"image": "p.png", "question": "q?", "answer": "four"}', '{"question": "q?", "answer": ["a"]}']
    for lines in ([row, *others], [*others, row]):
        path.write_text("\n".join(lines))
        source = open_source(str(path), "test")
        answers = [row["answers"] for row in read_rows(source, SPEC, "test", range(3))]
        assert answers == ([expected, ["four"], ["a"]] if lines[0] == row else [["four"], ["a"], expected])


def test_empty_cells_are_no_answer_and_no_question(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('image,question,answer\np.png,q?,4\np.png,q?,\np.png,,""\n\np.png,"",x\n')
    rows = read_rows(open_source(str(path), "test"), SPEC, "test", range(4))
    assert [row["answers"] for row in rows] == [["4"], [], [], ["x"]]
    assert [row["question"] for row in rows] == ["q?", "q?", "", ""]


def test_a_row_may_lack_keys(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a?"}\n{"answer": "b", "question": "b?"}\n\n')
    source = open_source(str(path), "test")
    assert source.column_names == ["question", "answer"]
    assert source.read([1, 0]) == [{"question": "b?", "answer": "b"}, {"question": "a?", "answer": None}]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (pa.array([4, None], pa.int64()), ["4", None]),
        (pa.array([4, -1], pa.int8()), ["4", "-1"]),
        (pa.array([2**64 - 1], pa.uint64()), ["18446744073709551615"]),
        (pa.array([4.0, 0.5, 1e20, None, float("inf")]), ["4", "0.5", "1e+20", None, "inf"]),
        (pa.array([4.0, float("nan")]), ["4", None]),
        (pa.array([123456789012.0, 0.1 + 0.2]), ["123456789012", "0.30000000000000004"]),
        (pa.array([0.1, 4, 3.14, float("nan")], pa.float32()), ["0.1", "4", "3.14", None]),
        (pa.array([16777216, 1e20], pa.float32()), ["16777216", "1e+20"]),
        (pa.array([0.1, 2], pa.float32()).cast(pa.float16()), ["0.1", "2"]),
        (pa.array([decimal.Decimal("1.10"), decimal.Decimal("0E-3")]), ["1.100", "0.000"]),
        (pa.array([True, False, None]), ["true", "false", None]),
        (pa.array([datetime.date(2020, 1, 1)]), ["2020-01-01"]),
        (pa.array([datetime.datetime(2020, 1, 1, 9, 30)]), ["2020-01-01 09:30:00"]),
        (pa.array([datetime.datetime(2020, 1, 1)]).cast(pa.timestamp("ns")), ["2020-01-01 00:00:00"]),
        (pa.array([datetime.time(9, 30)]), ["09:30:00"]),
        (pa.array([datetime.timedelta(minutes=90)]), ["1:30:00"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array(["a"], pa.large_string()), ["a"]),
        (pa.array([b"caf\xc3\xa9"]), ["café"]),
    ],
)  # fmt: skip
def test_typed_columns(value: pa.Array, expected: list[str | None], tmp_path: Path) -> None:
    """Alone and in lists, locally and behind a URI."""
    path = tmp_path / "rows.parquet"
    count = len(value)
    lists = pa.ListArray.from_arrays(pa.array(range(count + 1), pa.int32()), value)
    table = pa.table({"image": [png(1)] * count, "question": value, "answer": value, "answers": lists})
    pq.write_table(table, path)
    texts = [[] if text is None else [text] for text in expected]
    for name in (str(path), path.as_uri()):
        source = open_source(name, "test")
        for column in ("answer", "answers"):
            spec = DatasetSpec(question_column="question", image_column="image", answer_column=column)
            rows = read_rows(source, spec, "test", range(count))
            assert [row["answers"] for row in rows] == texts
            assert [row["question"] for row in rows] == [text or "" for text in expected]


def test_json_that_datasets_wrote_is_read(tmp_path: Path) -> None:
    values = [{"answer": "4"}, ["5", "6"], 0.5]
    made = datasets.Dataset.from_dict(
        {"question": ["q?"] * 3, "answer": list(map(json.dumps, values))},
        features=datasets.Features({"question": datasets.Value("string"), "answer": datasets.Json()}),
    )
    made.to_parquet(tmp_path / "rows.parquet")
    spec = DatasetSpec(question_column="question", answer_column="answer")
    for name in (str(tmp_path / "rows.parquet"), (tmp_path / "rows.parquet").as_uri()):
        rows = read_rows(open_source(name, "test"), spec, "test", range(3))
        assert [row["answers"] for row in rows] == [["4"], ["5", "6"], ["0.5"]]


@pytest.mark.parametrize("value", [["a"], {"from": "human"}, ()])
def test_structures_are_no_text(value: Any) -> None:
    with pytest.raises(ValueError, match="expected a text, got "):
        as_text(value)


def test_json_numbers_keep_their_digits() -> None:
    assert parse_json('{"a": [1.10, 1e3, -0], "b": true}') == {"a": ["1.10", "1e3", "-0"], "b": True}


# Files that are not what they should be


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.csv", b"image,question,image\np,q,r\n", "a.csv, line 1: two columns are called 'image'"),
        ("a.csv", b"question,answer\nq,a\nq,a,b\n", "a.csv, line 3: 3 cells under a header of 2"),
        ("a.csv", b'question,answer\n"q\nr",a\nq\n', "a.csv, line 4: 1 cells under a header of 2"),
        (
            "a.csv",
            b'question,answer\nq,a\n"q,a\nq,a\n',
            "a.csv, line 3: unexpected end of data: a quote",
        ),
        ("a.tsv", b'question\tanswer\n"5" wide\ta\n', "a.tsv, line 2: "),
        (
            "a.csv",
            "question,answer\nq,a\n".encode("utf-16"),
            "a.csv, line 1: NUL, so not UTF-8 text; UTF-16",
        ),
        ("a.jsonl", '{"question": "q"}'.encode("utf-16-le"), "a.jsonl, line 1: NUL, so not UTF-8 text"),
        ("a.jsonl", b'{"question": "q"}\n{"question": \n', "a.jsonl, line 2: Expecting value"),
        ("a.jsonl", b'{"question": "q"}\n["q"]\n', "a.jsonl, line 2: a list where an object was expected"),
        ("a.jsonl", b'{"a": 1, "a": 2}\n', "a.jsonl, line 1: an object has two values for 'a'"),
        ("a.json", b'[\n{"a": 1},\n{"a": 2]\n', "a.json, line 3: Expecting ',' delimiter"),
        ("a.json", b'[{"a": 1}]\n{"a": 2}', "a.json, line 1: something follows the list"),
        ("a.json", b'["q"]', "a.json, line 1: a text where an object was expected"),
        ("a.json", b'{"a": 1}, {"a": 2}', "a.json, line 1: "),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000, "a.jsonl, line 1: maximum recursion depth"),
        ("a.csv", b"question,answer\rq,a\r", "a.csv, line 1: a lone carriage return"),
    ],
)
def test_damaged_text_is_one_line_with_file_and_line(
    name: str, data: bytes, problem: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    message = mistake(tmp_path / name)
    assert message.startswith(f"--dataset_name {tmp_path / name} cannot be read: {problem}")


@pytest.mark.parametrize("name", ["e.jsonl", "e.json", "h.csv", "h.tsv", "l.json", "p.parquet", "m.jsonl"])
def test_a_dataset_without_rows(name: str, tmp_path: Path) -> None:
    contents = {"h": b"image,question,answer\n", "l": b"[]", "m": b"\n \n"}
    path = tmp_path / name
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"question": pa.array([], pa.string())}), path)
        assert mistake(path.as_uri()) == f"--dataset_name {path.as_uri()} has no rows in split 'test'"
    else:
        path.write_bytes(contents.get(path.stem, b""))
    assert mistake(path) == f"--dataset_name {path} has no rows in split 'test'"
    (tmp_path / "folder").mkdir()
    path.rename(tmp_path / "folder" / f"test{path.suffix}")
    assert mistake(tmp_path / "folder").startswith(f"--dataset_name {tmp_path / 'folder'} ")


def test_an_empty_csv(tmp_path: Path) -> None:
    (tmp_path / "e.csv").touch()
    assert mistake(tmp_path / "e.csv").endswith("e.csv cannot be read: e.csv is empty")


def test_files_of_a_split_have_the_same_header(tmp_path: Path) -> None:
    (tmp_path / "test-0.csv").write_text("question,answer\nq,a\n")
    (tmp_path / "test-1.csv").write_text("question\nq\n")
    assert mistake(tmp_path).endswith("test-1.csv lacks the column 'answer' that other files have")
    (tmp_path / "test-1.csv").write_text("answer,question\na2,q2\n")
    assert open_source(str(tmp_path), "test").read([1]) == [{"question": "q2", "answer": "a2"}]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_byte_order_mark_is_passed_over(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    text = "question,answer\r\nq,a\r\n" if suffix == ".csv" else '{"question": "q", "answer": "a"}\r\n'
    path.write_bytes(text.encode("utf-8-sig"))
    assert open_source(str(path), "test").read([0]) == [{"question": "q", "answer": "a"}]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
def test_a_byte_that_is_not_utf8_fails_its_row_alone(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    bad = b"O\xf9?"
    if suffix == ".parquet":
        texts = (
            pa.array([b"a?", bad, b"c?"]).cast(pa.string(), safe=False)
            if False
            else _unsafe([b"a?", bad, b"c?"])
        )
        pq.write_table(pa.table({"question": texts, "image": [png(1)] * 3, "answer": ["a"] * 3}), path)
    elif suffix == ".csv":
        path.write_bytes(b"image,question,answer\np.png,a?,a\np.png," + bad + b",a\np.png,c?,a\n")
    else:
        rows = [b'{"image":"p.png","question":"%s","answer":"a"}' % text for text in (b"a?", bad, b"c?")]
        path.write_bytes(b"[%s]" % b",\n".join(rows) if suffix == ".json" else b"\n".join(rows))
    (tmp_path / "p.png").write_bytes(png(1))
    for name in (str(path), path.as_uri()):
        source = pickle.loads(pickle.dumps(open_source(name, "test")))
        rows = read_rows(source, SPEC, "test", range(3))
        assert [row["error"] for row in rows][::2] == [None, None]
        assert rows[1]["error"] == (
            "the question is no text: text that is not UTF-8 (byte 0xf9 in 'O??'); convert the file"
        )
        assert pa.array([row["question"] for row in rows], pa.string()).to_pylist() == ["a?", "O??", "c?"]


def _unsafe(texts: list[bytes]) -> pa.Array:
    """Make an array of texts as careless writers do: nobody looked whether they are UTF-8."""
    data = pa.array(texts, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(data), data.buffers())


def test_half_a_surrogate_pair_fails_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"question": "a \\ud83d b", "answer": "a"}\n{"question": "\\ud83d\\ude00", "answer": "a"}'
    )
    spec = DatasetSpec(question_column="question", answer_column="answer")
    rows = read_rows(open_source(str(path), "test"), spec, "test", [0, 1])
    assert rows[0]["error"] is not None
    assert "lone surrogate \\ud83d" in rows[0]["error"]
    assert (rows[1]["error"], rows[1]["question"]) == (None, "😀")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question\na\nb\n")
    source = open_source(str(path), "test")
    path.write_text("question\nccc\na\n")
    with pytest.raises(ValueError, match=r"rows\.csv changed while it was in use"):
        source.read([0])


def test_images_lie_beside_a_link(tmp_path: Path) -> None:
    """As in the hub's cache; but a link to a dataset that lies elsewhere finds the images there."""
    for name in ("blobs", "snap"):
        (tmp_path / name).mkdir()
    (tmp_path / "blobs" / "abc").write_text('{"image": "pic.png", "question": "q?", "answer": "a"}\n')
    link = tmp_path / "snap" / "test.jsonl"
    link.symlink_to("../blobs/abc")
    for folder in ("snap", "blobs"):
        (tmp_path / folder / "pic.png").write_bytes(png(1))
        (row,) = read_rows(open_source(str(link), "test"), SPEC, "test", [0])
        assert (row["error"], row["images"]) == (None, [png(1)])
        (tmp_path / folder / "pic.png").unlink()


def test_names_of_files_are_no_patterns(tmp_path: Path) -> None:
    folder = tmp_path / "odd [x]*"
    folder.mkdir()
    (folder / "a[1]?.csv").write_text("question\nq?\n")
    assert open_source(str(folder / "a[1]?.csv"), "test").read([0]) == [{"question": "q?"}]


def test_training_opens_the_same_texts(tmp_path: Path) -> None:
    name = _file(tmp_path, ".csv", ["007", "NA"])
    from vlmray.finetune.plan import open_training_data

    data = open_training_data(FinetuneConfig(dataset_name=name, model_id="tiny-random"))
    assert [row["answers"] for row in data.train.read([0, 1])] == [["007"], ["NA"]]
