"""Sources: the same rows at the same index however a dataset is kept, and one line for what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from helpers.paths import CHARTQA
from vlmray.builtin import charts
from vlmray.builtin.drawing import draw_chart
from vlmray.dataset.parquet import ParquetSource
from vlmray.dataset.registry import DATASETS, get_dataset_columns
from vlmray.dataset.samples import to_sample
from vlmray.dataset.slices import sample_id
from vlmray.dataset.sources import Source, open_source
from vlmray.images.reading import load_image_pil
from vlmray.storage import hub

NUM_ROWS = 23


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` makes out of the user's cache, and every test off the network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def _png(number: int) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def _hf_dataset(start: int = 0, stop: int = NUM_ROWS) -> datasets.Dataset:
    """Make rows whose columns all say their number."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "query": datasets.Value("string"),
            "label": datasets.List(datasets.Value("string")),
            "human_or_machine": datasets.ClassLabel(names=["human", "machine"]),
        }
    )
    numbers = range(start, stop)
    columns = {
        "image": [{"bytes": _png(number), "path": None} for number in numbers],
        "query": [f"question {number}" for number in numbers],
        "label": [[str(number), f"number {number}"] for number in numbers],
        "human_or_machine": [number % 2 for number in numbers],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def _check_rows(source: Source, num_rows: int = NUM_ROWS) -> None:
    """Read in any order, with repeats, before and after pickling: the number in a row is its index."""
    assert len(source) == num_rows
    rng = random.Random(0)
    pickled = pickle.dumps(source)
    assert len(pickled) < 10_000
    orders = [
        range(num_rows),
        reversed(range(num_rows)),
        [rng.randrange(num_rows) for _ in range(40)],
        [],
        [0],
    ]
    for copy in (source, pickle.loads(pickled)):
        assert list(copy.column_names) == list(source.column_names)
        assert (copy.on_driver, copy.base_dir) == (source.on_driver, source.base_dir)
        for order in map(list, orders):
            rows = copy.read(order)
            assert [row["query"] for row in rows] == [f"question {index}" for index in order]
            for index, row in zip(order, rows, strict=True):
                _check_row(row, index)


def _check_row(row: dict[str, Any], index: int) -> None:
    if "human_or_machine" in row:
        assert row["human_or_machine"] == ("human", "machine")[index % 2]
    if "label" in row:
        assert row["label"] == [str(index), f"number {index}"]
    if isinstance(row.get("image"), dict):
        assert load_image_pil(row["image"]).getpixel((0, 0)) == (index, 0, 0)


def _mistake(name: object, split: str = "test", config: str | None = None) -> str:
    with pytest.raises(ValueError, match="--dataset_") as error_info:
        open_source(str(name), split, config)
    message = str(error_info.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


# What `datasets` loads


def _parquet_folder(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    _hf_dataset().to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    _hf_dataset(100, 105).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


def _parquet_file(folder: Path) -> Path:
    path = folder / "rows.parquet"
    _hf_dataset().to_parquet(path)
    return path


def _saved(folder: Path) -> Path:
    _hf_dataset().save_to_disk(folder / "saved")
    return folder / "saved"


def _saved_splits(folder: Path) -> Path:
    splits = datasets.DatasetDict({"test": _hf_dataset(), "train": _hf_dataset(100, 105)})
    splits.save_to_disk(folder / "splits")
    return folder / "splits"


@pytest.mark.parametrize("write", [_parquet_folder, _parquet_file, _saved, _saved_splits])
def test_local_datasets(write: Callable[[Path], Path], tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path)), "test")
    assert source.on_driver
    assert list(source.column_names) == ["image", "query", "label", "human_or_machine"]
    _check_rows(source)


def test_splits_are_kept_apart(tmp_path: Path) -> None:
    for name in (_parquet_folder(tmp_path / "a"), _saved_splits(tmp_path)):
        assert [row["query"] for row in open_source(str(name), "train").read([4, 0])] == [
            "question 104",
            "question 100",
        ]
        assert _mistake(name, "val") in (
            f"--dataset_split 'val': {name} has train, test",
            f"--dataset_split 'val': {name} has test, train",
        )


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_text_files_with_relative_images(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pictures").mkdir()
    rows = []
    for number in range(NUM_ROWS):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(_png(number))
        rows.append({"query": f"question {number}", "image": f"pictures/{number}.png"})
    path = tmp_path / f"rows{suffix}"
    if suffix.startswith(".json"):
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        separator = "\t" if suffix == ".tsv" else ","
        lines = [separator.join(row.values()) for row in rows]
        path.write_text("\n".join([separator.join(rows[0]), *lines]), encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (str(path), f"../rows{suffix}", f"~/rows{suffix}"):
        source = open_source(name, "test")
        _check_rows(source)
        for index, row in enumerate(source.read(range(NUM_ROWS))):
            assert load_image_pil(row["image"], base_dir=source.base_dir).getpixel((0, 0)) == (index, 0, 0)


def test_image_folder_with_metadata(tmp_path: Path) -> None:
    folder = tmp_path / "pictures" / "test"
    folder.mkdir(parents=True)
    lines = []
    for number in range(NUM_ROWS):
        (folder / f"{number:02}.png").write_bytes(_png(number))
        lines.append(json.dumps({"file_name": f"{number:02}.png", "query": f"question {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    _check_rows(open_source(str(tmp_path / "pictures"), "test"))


def test_nothing_is_decoded_before_it_is_needed(tmp_path: Path) -> None:
    """A broken image is a bad row, not a dead run, also in a list of images."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "images": datasets.List(datasets.Image()),
            "query": datasets.Value("string"),
        }
    )
    broken = {"bytes": b"broken", "path": None}
    good = {"bytes": _png(1), "path": None}
    columns = {"image": [broken, good], "images": [[broken], [good]], "query": ["question 0", "question 1"]}
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    for name in (str(path), path.as_uri()):
        rows = open_source(name, "test").read([0, 1])
        assert [row["image"] for row in rows] == [broken, good]
        assert [row["images"] for row in rows] == [[broken], [good]]


def test_classes_without_a_label_are_none(tmp_path: Path) -> None:
    features = datasets.Features({"kind": datasets.ClassLabel(names=["a", "b"])})
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"kind": [1, -1, None, 0]}, features=features).to_parquet(path)
    for name in (str(path), path.as_uri()):
        assert [row["kind"] for row in open_source(name, "test").read(range(4))] == ["b", None, None, "a"]


# Parquet behind a URI


@pytest.fixture
def parquet_parts(tmp_path: Path) -> Path:
    """Several files of several row groups, an empty file and an empty row group among them."""
    folder = tmp_path / "parts of it"
    folder.mkdir()
    table = _hf_dataset().data.table
    schema = pq.read_schema(_parquet_file(tmp_path))  # with the notes of `datasets`
    starts = [0, 7, 7, 16, NUM_ROWS]
    for part, (start, stop) in enumerate(pairwise(starts)):
        rows = table.slice(start, stop - start).cast(schema)
        with pq.ParquetWriter(folder / f"test-{part:05}.parquet", schema) as writer:
            for first in range(0, len(rows), 3):
                writer.write_table(rows.slice(first, 3))
                writer.write_table(rows.slice(0, 0))
    _hf_dataset(100, 105).to_parquet(folder / "train-00000.parquet")
    (folder / "README.md").write_text("not data")
    return folder


def test_a_uri_reads_like_datasets_does(parquet_parts: Path) -> None:
    source = open_source(parquet_parts.as_uri(), "test")
    assert isinstance(source, ParquetSource)
    assert not source.on_driver
    _check_rows(source)
    _check_rows(open_source(parquet_parts.as_uri() + "/", "test"))
    local = open_source(str(parquet_parts), "test")
    assert list(local.column_names) == list(source.column_names)
    assert local.read(range(NUM_ROWS)) == source.read(range(NUM_ROWS))
    assert len(open_source(parquet_parts.as_uri(), "train")) == 5


def test_a_uri_of_one_file_takes_any_split(parquet_parts: Path) -> None:
    uri = (parquet_parts / "train-00000.parquet").as_uri()
    for split in ("test", "train", "anything"):
        assert [row["query"] for row in open_source(uri, split).read([3])] == ["question 103"]


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (["a.parquet", "b.parquet"], "test", ["a.parquet", "b.parquet"]),
        (["test-0.parquet", "train-0.parquet", "training.parquet"], "train", ["train-0.parquet"]),
        (["test.parquet", "train.parquet"], "test", ["test.parquet"]),
        (["test/0.parquet", "train/0.parquet"], "test", ["test/0.parquet"]),
        (["human/0.parquet", "test/0.parquet"], "human", ["human/0.parquet"]),
        (["testmini-0.parquet", "test-0.parquet"], "testmini", ["testmini-0.parquet"]),
        (["testmini-0.parquet", "test-0.parquet"], "test", ["test-0.parquet"]),
        (["train-0.parquet"], "test", None),
        (["train/0.parquet", "val/0.parquet"], "test", None),
    ],
)
def test_splits_behind_a_uri(
    files: list[str], split: str, expected: list[str] | None, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"query": [file]}), folder / file)
    if expected is None:
        known = ", ".join(sorted({file.replace("/", "-").partition("-")[0] for file in files}))
        assert _mistake(folder.as_uri(), split) == f"--dataset_split '{split}': {folder.as_uri()} has {known}"
    else:
        source = open_source(folder.as_uri(), split)
        assert [row["query"] for row in source.read(range(len(source)))] == expected


def test_parquet_that_datasets_did_not_write(tmp_path: Path) -> None:
    # A map is no type that `datasets` knows.
    notes = pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64()))
    table = pa.table({"query": ["question 0", "question 1"], "notes": notes})
    pq.write_table(table, tmp_path / "rows.parquet")
    _check_rows(open_source((tmp_path / "rows.parquet").as_uri(), "test"), num_rows=2)


def test_files_of_different_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"query": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"question": ["b"]}), tmp_path / "b.parquet")
    assert "b.parquet has columns question, but" in _mistake(tmp_path.as_uri())


def _check_columns(source: Source) -> None:
    """Any columns in any order of rows are those columns of the whole rows."""
    order = [5, 2, 2, 7, 0]
    whole = source.read(order)
    names = list(source.column_names)
    rng = random.Random(0)
    for columns in [[name] for name in names] + [
        rng.sample(names, rng.randint(1, len(names))) for _ in range(8)
    ]:
        rows = source.read(order, columns)
        assert rows == [{name: row[name] for name in columns} for row in whole]
        assert source.read([], columns) == []
    assert source.read(order, names) == source.read(order) == whole


@pytest.mark.parametrize("write", [_parquet_folder, _parquet_file, _saved, _saved_splits])
def test_columns_of_local_datasets(write: Callable[[Path], Path], tmp_path: Path) -> None:
    _check_columns(open_source(str(write(tmp_path)), "test"))


def test_columns_of_other_sources(parquet_parts: Path, tmp_path: Path) -> None:
    _check_columns(open_source(parquet_parts.as_uri(), "test"))
    _check_columns(open_source("charts?num_rows=12", "test"))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"query": f"{n}", "image": "a.png", "n": n}) for n in range(9)))
    _check_columns(open_source(str(path), "test"))


def test_columns_are_kept_apart_between_reads(parquet_parts: Path) -> None:
    """The row group that was read last is kept, but only for the same columns."""
    source = open_source(parquet_parts.as_uri(), "test")
    for columns in (["query"], None, ["label", "query"], ["query"]):
        assert list(source.read([3], columns)[0]) == (columns or list(source.column_names))
    assert source.read([1], ["human_or_machine"]) == [{"human_or_machine": "machine"}]


def test_a_chart_is_drawn_only_for_its_image(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw = draw_chart
    monkeypatch.setattr(charts, "draw_chart", lambda chart: drawn.append(chart) or draw(chart))
    source = open_source("charts?num_rows=12", "test")
    source.read(range(12), ["image_id", "question", "answers", "family"])
    assert not drawn
    source.read([4], ["answers", "image"])
    assert len(drawn) == 1


def test_a_row_that_is_not_there(parquet_parts: Path) -> None:
    for name in (str(parquet_parts), parquet_parts.as_uri(), "charts?num_rows=23"):
        for columns in (None, ["question" if name.startswith("charts") else "query"]):
            with pytest.raises(IndexError):
                open_source(name, "test").read([NUM_ROWS], columns)


# Charts and ChartQA


def test_charts() -> None:
    source = open_source("charts?num_rows=12&seed=3", "test")
    assert (len(source), source.on_driver, source.base_dir) == (12, False, None)
    pickled = pickle.dumps(source)
    assert len(pickled) < 1000
    order = [7, 3, 3, 11, 0]
    assert pickle.loads(pickled).read(order) == [source.read([index])[0] for index in order]
    assert set(source.read([0])[0]) == set(source.column_names)


def test_mistakes_with_charts() -> None:
    assert _mistake("charts?rows=3").startswith(
        "--dataset_name: charts: unknown parameter 'rows'; known: num_rows"
    )
    assert _mistake("charts", "dev").startswith("--dataset_split: charts: unknown split 'dev'; known: train")


@pytest.mark.skipif(not CHARTQA.is_dir(), reason=f"no real ChartQA at {CHARTQA}")
@pytest.mark.parametrize("as_uri", [False, True])
def test_real_chartqa(as_uri: bool) -> None:
    source = open_source(CHARTQA.as_uri() if as_uri else str(CHARTQA), "test")
    spec = get_dataset_columns(str(CHARTQA), source.column_names)
    assert spec == DATASETS["HuggingFaceM4/ChartQA"]
    rows = source.read(range(len(source)))
    samples = [to_sample(row, spec, sample_id("test", index)) for index, row in enumerate(rows)]
    assert len(samples) == 600
    assert [sum(sample.family == name for sample in samples) for name in ("human", "augmented")] == [300, 300]
    assert all(sample.answers and sample.question for sample in samples)
    assert len({sample.image for sample in samples}) == 370
    load_image_pil(samples[0].image)


# What is wrong


def test_nothing_at_the_path(tmp_path: Path) -> None:
    for name in (tmp_path / "gone", tmp_path / "gone.parquet", "./gone", "gone.jsonl", "~/gone"):
        assert _mistake(name) == f"--dataset_name {name}: no such file or folder"
    assert _mistake((tmp_path / "gone").as_uri()).endswith("/gone: no Parquet file there")


@pytest.mark.parametrize("content", ["empty", "truncated", "random"])
def test_damaged_parquet(content: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # Words in a path must not be taken for what is wrong.
    folder = tmp_path / "config" / "split" / "data"
    folder.mkdir(parents=True)
    path = folder / "test.parquet"
    _hf_dataset().to_parquet(path)
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "truncated": data[: len(data) // 2], "random": os.urandom(2000)}[content])
    for name in (path, folder, folder.as_uri(), path.as_uri()):
        message = _mistake(name)
        assert message.startswith(f"--dataset_name {name}")
        assert "cannot be read: " in message
    assert capfd.readouterr().err == ""  # `datasets` would log it as well


@pytest.mark.parametrize("text", ["{not json", '{"a": 1}\n{"a": ', "\x00\x01"])
def test_damaged_json_lines(text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    assert _mistake(path).startswith(f"--dataset_name {path} cannot be read: ")
    assert capfd.readouterr().err == ""


def test_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "doesn't contain any data files" in _mistake(tmp_path / "empty")
    assert _mistake((tmp_path / "empty").as_uri()).endswith("no Parquet file there")


def test_an_unknown_file_type(tmp_path: Path) -> None:
    (tmp_path / "rows.docx").write_text("")
    assert _mistake(tmp_path / "rows.docx").endswith(
        "unknown file type '.docx'; known: .parquet, .jsonl, .json, .csv, .tsv, .arrow"
    )


def test_unknown_configurations(tmp_path: Path) -> None:
    folder = _parquet_folder(tmp_path / "folder")
    assert _mistake(folder, config="hard") == (
        "--dataset_config 'hard': BuilderConfig 'hard' not found. Available: ['default']"
    )
    for name in (_parquet_file(tmp_path), folder.as_uri(), "charts"):
        assert _mistake(name, config="hard") == f"--dataset_config 'hard': {name} has no configurations"


def test_a_configuration_is_needed(tmp_path: Path) -> None:
    for config in ("easy", "hard"):
        (tmp_path / config).mkdir()
        pq.write_table(pa.table({"query": [config]}), tmp_path / config / "test.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: easy\n  data_files: easy/*.parquet\n"
        "- config_name: hard\n  data_files: hard/*.parquet\n---\n"
    )
    assert _mistake(tmp_path).startswith("--dataset_config None: Config name is missing.")
    assert open_source(str(tmp_path), "train", "hard").read([0]) == [{"query": "hard"}]


@pytest.mark.parametrize("split", ["test[:10]", "test/0"])
def test_a_split_is_only_a_name(split: str) -> None:
    assert _mistake("charts", split) == (
        f"--dataset_split '{split}' is not a split name; rows are chosen by --sample_slices"
    )


# The hub


@pytest.mark.parametrize(
    "name", ["owner/name", "squad", "data/rows.txt", "a/b/c", "not a name!", "https://x.org/y"]
)
def test_without_the_hub_the_message_names_what_works(name: str) -> None:
    message = _mistake(name)
    assert message.startswith(f"--dataset_name '{name}' is n")
    assert message.endswith(
        "give a local folder or file, or charts, or fill the cache below HF_HOME beforehand"
    )


class _Hub(BaseHTTPRequestHandler):
    """A hub that knows one repository, refuses one, and for another never answers."""

    def do_GET(self) -> None:
        if "hangs" in self.path:
            time.sleep(3)
        status, code = {"gated": (403, "GatedRepo"), "known": (200, "")}.get(
            self.path.partition("owner/")[2].partition("/")[0], (404, "RepoNotFound")
        )
        body = b'{"id": "owner/known", "siblings": []}'
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def local_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("local_hub")
def test_what_the_hub_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_TIMEOUT_S", 0.3)
    hub.check_reachable("owner/known", "dataset", option="--dataset_name")
    for name, problem in {
        "gone": "is not a dataset on the hub that this login can see",
        "gated": "needs accepted terms and a login",
        "hangs": "is not here and the hub cannot be reached (ReadTimeout)",
    }.items():
        with pytest.raises(hub.HubUnavailableError) as error_info:
            hub.check_reachable(f"owner/{name}", "dataset", option="--dataset_name")
        assert str(error_info.value).startswith(f"--dataset_name 'owner/{name}' {problem}")


SCRIPT = """
import sys
from vlmray.dataset.sources import open_source
try:
    source = open_source(*sys.argv[1:])
    print(len(source), source.read([5])[0]["query"], sep=", ", end="")
except ValueError as error:
    print("error:", error, end="")
"""


def _in_a_new_process(home: Path, *args: str, offline: bool) -> tuple[str, str]:
    """Open a source as a user's machine would; the hub's address refuses connections."""
    dropped = (
        "HF_HUB_OFFLINE",
        "HF_DATASETS_OFFLINE",
        "HF_HUB_CACHE",
        "HF_DATASETS_CACHE",
        "TRANSFORMERS_OFFLINE",
    )
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    env |= {"HF_HOME": str(home), "HF_ENDPOINT": "http://127.0.0.1:9"} | (
        {"HF_HUB_OFFLINE": "1"} if offline else {}
    )
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *args], env=env, capture_output=True, text=True, timeout=15, check=True
    )
    return done.stdout, done.stderr


@pytest.fixture
def hf_home(tmp_path: Path) -> Path:
    """A cache as the hub's client leaves it."""
    repository = tmp_path / "home" / "hub" / "datasets--owner--name"
    _parquet_folder(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    return tmp_path / "home"


@pytest.mark.parametrize("offline", [False, True])
def test_the_hubs_cache_works_without_the_hub(offline: bool, hf_home: Path) -> None:
    assert _in_a_new_process(hf_home, "owner/name", "test", offline=offline)[0] == "23, question 5"


def test_the_cache_of_datasets_works_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What `load_dataset("owner/Name")` leaves: the same files that a local folder of that name does.
    made = tmp_path / "home" / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(made))
    loaded = datasets.load_dataset(str(_parquet_folder(tmp_path / "files")), split="test")
    config_dir = Path(loaded.cache_files[0]["filename"]).parents[2]
    config_dir.parent.rename(made / "owner___some_name")
    for path in (made / "owner___some_name").rglob("*.arrow"):
        path.rename(path.with_name(path.name.replace("files-", "some_name-")))
    assert (
        _in_a_new_process(tmp_path / "home", "owner/SomeName", "test", offline=False)[0] == "23, question 5"
    )


def test_a_name_that_is_nowhere_is_one_line_at_once(hf_home: Path) -> None:
    out, err = _in_a_new_process(hf_home, "owner/other", "test", offline=False)
    assert out.startswith("error: --dataset_name 'owner/other' is not here and the hub cannot be reached")
    assert "\n" not in out
    assert err == ""
