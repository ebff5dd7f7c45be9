"""What `datasets` reads: files and folders, the hub and its caches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.datasets import NUM_ROWS, check_rows, mistake, parquet_file, parquet_folder, png, saved_splits
from vlmray.dataset.huggingface import load_hf_dataset
from vlmray.dataset.sources import open_source
from vlmray.images.reading import load_image_pil
from vlmray.storage import hub


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_text_files_with_relative_images(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pictures").mkdir()
    rows = []
    for number in range(NUM_ROWS):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(png(number))
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
        check_rows(source)
        for index, row in enumerate(source.read(range(NUM_ROWS))):
            assert load_image_pil(row["image"], base_dir=source.base_dir).getpixel((0, 0)) == (index, 0, 0)


def test_image_folder_with_metadata(tmp_path: Path) -> None:
    folder = tmp_path / "pictures" / "test"
    folder.mkdir(parents=True)
    lines = []
    for number in range(NUM_ROWS):
        (folder / f"{number:02}.png").write_bytes(png(number))
        lines.append(json.dumps({"file_name": f"{number:02}.png", "query": f"question {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    check_rows(open_source(str(tmp_path / "pictures"), "test"))


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
    good = {"bytes": png(1), "path": None}
    columns = {"image": [broken, good], "images": [[broken], [good]], "query": ["question 0", "question 1"]}
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    for name in (str(path), path.as_uri()):
        rows = open_source(name, "test").read([0, 1])
        assert [row["image"] for row in rows] == [broken, good]
        assert [row["images"] for row in rows] == [[broken], [good]]


def test_classes_without_a_label_are_none(tmp_path: Path) -> None:
    kind = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"kind": kind, "kinds": datasets.List(kind)})
    path = tmp_path / "rows.parquet"
    columns = {"kind": [1, -1, None, 0], "kinds": [[1, 0], [-1], None, []]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    for name in (str(path), path.as_uri()):
        rows = open_source(name, "test").read(range(4))
        assert [row["kind"] for row in rows] == ["b", None, None, "a"]
        assert [row["kinds"] for row in rows] == [["b", "a"], [None], None, []]


@pytest.mark.parametrize("text", ["{not json", '{"a": 1}\n{"a": ', "\x00\x01"])
def test_damaged_json_lines(text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    assert mistake(path).startswith(f"--dataset_name {path} cannot be read: ")
    assert capfd.readouterr().err == ""


def test_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "doesn't contain any data files" in mistake(tmp_path / "empty")
    assert mistake((tmp_path / "empty").as_uri()).endswith("no Parquet file there")


def test_an_unknown_file_type(tmp_path: Path) -> None:
    (tmp_path / "rows.docx").write_text("")
    assert mistake(tmp_path / "rows.docx").endswith(
        "unknown file type '.docx'; known: .parquet, .jsonl, .json, .csv, .tsv, .arrow"
    )


def test_unknown_configurations(tmp_path: Path) -> None:
    folder = parquet_folder(tmp_path / "folder")
    assert mistake(folder, config="hard") == (
        "--dataset_config 'hard': BuilderConfig 'hard' not found. Available: ['default']"
    )
    for name in (parquet_file(tmp_path), folder.as_uri(), "charts"):
        assert mistake(name, config="hard") == f"--dataset_config 'hard': {name} has no configurations"


def test_a_configuration_is_needed(tmp_path: Path) -> None:
    for config in ("easy", "hard"):
        (tmp_path / config).mkdir()
        pq.write_table(pa.table({"query": [config]}), tmp_path / config / "test.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: easy\n  data_files: easy/*.parquet\n"
        "- config_name: hard\n  data_files: hard/*.parquet\n---\n"
    )
    assert mistake(tmp_path).startswith("--dataset_config None: Config name is missing.")
    assert open_source(str(tmp_path), "train", "hard").read([0]) == [{"query": "hard"}]


def test_unknown_splits_name_the_known_ones(tmp_path: Path) -> None:
    folder = parquet_folder(tmp_path / "folder")
    for name in (folder, saved_splits(tmp_path)):
        found = mistake(name, "tset")
        assert found.startswith(f"--dataset_split 'tset': {name} has ")
        assert set(found.partition(" has ")[2].split(", ")) == {"train", "test"}


def test_the_library_takes_splits_as_datasets_does(tmp_path: Path) -> None:
    folder = str(parquet_folder(tmp_path / "folder"))
    assert len(load_hf_dataset(folder, "test[:3]")) == 3
    assert len(load_hf_dataset(folder, "train+test")) == 5 + NUM_ROWS


def test_a_file_may_be_called_any_split_that_has_a_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "Why?"}')
    assert len(open_source(str(path), "any.split_1")) == 1
    message = mistake(path, "my split")
    assert message == "--dataset_split 'my split' is not a split name; use letters, digits, _ and ."


@pytest.mark.parametrize(
    "name", ["owner/name", "squad", "data/rows.txt", "a/b/c", "not a name!", "https://x.org/y"]
)
def test_without_the_hub_the_message_names_what_works(name: str) -> None:
    message = mistake(name)
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
    hub.check_reachable("owner/known", "dataset")
    for name, problem in {
        "gone": "is not a dataset on the hub that this login can see",
        "gated": "needs accepted terms and a login",
        "hangs": "is not here and the hub cannot be reached (ReadTimeout)",
    }.items():
        with pytest.raises(hub.HubUnavailableError) as error_info:
            hub.check_reachable(f"owner/{name}", "dataset")
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
    parquet_folder(repository / "snapshots" / "abc")
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
    loaded = datasets.load_dataset(str(parquet_folder(tmp_path / "files")), split="test")
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
