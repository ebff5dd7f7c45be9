"""A run's folder: files are whole or not there, and only the run that it is of goes on with it."""

from __future__ import annotations

import errno
import json
import re
import threading
from pathlib import Path
from typing import Any, get_args

import pytest

from vlmray.errors import RunError
from vlmray.storage import run_folder
from vlmray.storage.filesystem import check_apart
from vlmray.storage.run_folder import RunFolder
from vlmray.storage.run_options import Earlier

OPTIONS = {"job": "tune", "model_id": "tiny", "max_new_tokens": 5, "choices": ("a", "b")}


class _Folder(RunFolder):
    """The folder of a job whose results are a file and a folder."""

    def written(self) -> list[str]:
        return [name for name in ("result.txt", "results") if self.has(name)]


def _open(path: Path | str, earlier: Earlier = "resume", **options: Any) -> _Folder:
    return _Folder.open(str(path), {**OPTIONS, **options}, earlier=earlier)


def _answer(folder: RunFolder) -> None:
    folder.write_text("result.txt", "1")
    folder.write_text("results/more.txt", "2")


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_full_disk_is_said_with_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _open(tmp_path)
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("Error writing bytes to file. Detail: [errno 28] No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ):

        class Full:
            type_name = "local"

            def open_output_stream(self, path: str, error: OSError = error) -> None:
                raise error

        with monkeypatch.context() as patched:
            patched.setattr(run_folder, "open_filesystem", lambda uri: (Full(), uri))
            with pytest.raises(
                RunError, match=f"^no space left on device: {tmp_path}; free some and run again$"
            ):
                folder.write_text("a", "b")


@pytest.mark.parametrize(
    ("output", "data", "problem"),
    [
        ("data", "data", "lie in one another"),
        ("data/out", "data", "lie in one another"),
        ("data/out/deeper", "data", "lie in one another"),
        (".", "data", "lie in one another"),
        ("link/out", "data", "lie in one another"),
        ("data/out", "link", "lie in one another"),
        ("file://{here}/data/out", "data", "lie in one another"),
        ("data/out", "file://{here}/data", "lie in one another"),
        ("data/../data/out", "./data", "lie in one another"),
        ("data", "data/results.json", "would be written"),
        ("model", "data", "is the folder of model"),
        ("data", "data/rows.jsonl", None),
        ("data/out", "data/rows.jsonl", None),
        ("out", "data", None),
        ("data-2", "data", None),
        ("model/out", "data", None),
        ("charts", "charts?num_rows=3", None),
        ("s3://bucket/data/out", "s3://bucket/data", None),
    ],
)
def test_results_are_kept_apart_from_what_is_read(
    output: str, data: str, problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("data", "model", "out"):
        (tmp_path / folder).mkdir()
    for name in ("rows.jsonl", "results.json"):
        (tmp_path / "data" / name).touch()
    (tmp_path / "link").symlink_to("data")
    output, data = (name.format(here=tmp_path) for name in (output, data))
    if problem is None:
        check_apart(output, data, "model", None)
        return
    with pytest.raises(
        ValueError, match=rf"^--output_dir {re.escape(output)} .*{problem}.*; choose another f"
    ):
        check_apart(output, data, "model", None)


# Whose folder it is


def test_other_options_are_named(tmp_path: Path) -> None:
    _answer(_open(tmp_path))
    _open(tmp_path, choices=["a", "b"])  # the same in JSON
    before = _tree(tmp_path)
    with pytest.raises(ValueError, match="holds another run") as error_info:
        _open(tmp_path, max_new_tokens=7, adapter="x\ny")
    message = str(error_info.value)
    assert "(adapter was None, now 'x\\ny'; max_new_tokens was 5, now 7)" in message
    assert message.endswith("choose another folder, or pass --overwrite to delete it")
    assert "model_id" not in message
    assert "\n" not in message
    assert _tree(tmp_path) == before


def test_an_option_that_is_new_and_not_set_changes_nothing(tmp_path: Path) -> None:
    _answer(_open(tmp_path))
    _open(tmp_path, invented_later=None)
    _open(tmp_path)
    with pytest.raises(ValueError, match=r"holds another run \(invented_later was None, now 5\)"):
        _open(tmp_path, invented_later=5)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_damaged_options(text: str, tmp_path: Path) -> None:
    (tmp_path / "options.json").write_text(text)
    with pytest.raises(ValueError, match=r"options.json is damaged \(.*\); choose another folder"):
        _open(tmp_path)


@pytest.mark.parametrize("earlier", get_args(Earlier))
@pytest.mark.parametrize("has_results", [False, True])
def test_a_folder_of_another_job_is_left_alone(earlier: Earlier, has_results: bool, tmp_path: Path) -> None:
    """Its options, report and manifest are not those of a run that never began, and not to be deleted."""
    folder = _open(tmp_path)
    if has_results:
        _answer(folder)
    folder.finish({"steps": 9}, "<html>")
    before = _tree(tmp_path)
    message = r"holds another run \(job was 'tune', now '{}'\); choose another folder$"
    with pytest.raises(ValueError, match=message.format("drill")):
        _open(tmp_path, earlier, job="drill")
    with pytest.raises(ValueError, match=message.format("infer")):
        RunFolder.open(str(tmp_path), {"model_id": "tiny"}, earlier=earlier)
    with pytest.raises(ValueError, match=message.format("drill")):
        RunFolder.find(str(tmp_path), "drill")
    assert _tree(tmp_path) == before
    assert RunFolder.find(str(tmp_path), "tune").uri == folder.uri
    assert RunFolder.find(str(tmp_path / "new"), "tune").uri == str(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_run_that_has_to_be_there(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{tmp_path} holds no run to go on with; leave out --resume"):
            _open(tmp_path, "require")
    folder = _open(tmp_path)
    _open(tmp_path, "require", seed=1)  # it ended before its first result, and binds nobody
    _open(tmp_path, "require")
    _answer(folder)
    before = _tree(tmp_path)
    _open(tmp_path, "require", choices=["a", "b"], new=None)  # the same in JSON
    for changed in ({"model_id": "large"}, {"seed": 1}, {"max_new_tokens": None}):
        with pytest.raises(ValueError, match=r"holds another run \(\w+ was .+, now .+\); choose another"):
            _open(tmp_path, "require", **changed)
    assert folder.read_options() == {**json.loads(json.dumps(OPTIONS)), "new": None}
    assert _tree(tmp_path).keys() == before.keys()


def test_a_run_that_must_not_be_there(tmp_path: Path) -> None:
    _open(tmp_path, "refuse")
    folder = _open(tmp_path, "refuse", seed=1)
    _answer(folder)
    before = _tree(tmp_path)
    for options in ({"seed": 1}, {"seed": 2}):
        with pytest.raises(ValueError, match="holds an earlier run; pass --resume to go on with it, --overw"):
            _open(tmp_path, "refuse", **options)
    assert _tree(tmp_path) == before


def test_deleting_takes_what_is_ours(tmp_path: Path) -> None:
    folder = _open(tmp_path)
    _answer(folder)
    folder.finish({"steps": 9}, "<html>")
    (tmp_path / "notes.txt").write_text("mine")
    _open(tmp_path, "delete", seed=1)
    assert _tree(tmp_path).keys() == {"options.json", "notes.txt"}
    assert not (tmp_path / "results").exists()
    assert folder.read_options() == json.loads(json.dumps({**OPTIONS, "seed": 1}))


@pytest.mark.parametrize("earlier", get_args(Earlier))
def test_results_that_nothing_says_what_they_are_of(earlier: Earlier, tmp_path: Path) -> None:
    (tmp_path / "result.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds results but no options.json that says what they are of"):
        _open(tmp_path, earlier)
    assert _tree(tmp_path) == {"result.txt": b"mine"}


# Folders


@pytest.mark.parametrize("by_uri", [False, True])
def test_a_folder_is_made_or_opened(by_uri: bool, tmp_path: Path) -> None:
    path = tmp_path / "a b" / "c"
    name = path.as_uri() if by_uri else str(path)
    RunFolder.create(name).write_text("x.txt", "x")
    assert path.is_dir()
    again = RunFolder.create(name)
    assert (again.has("x.txt"), again.has("y.txt"), again.has("x.txt/z")) == (True, False, False)


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_made(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a regular file")
    for output_dir in (str(tmp_path / name), (tmp_path / name).as_uri(), "s4://bucket/x"):
        with pytest.raises(ValueError, match=f"--output_dir {output_dir} cannot be written: ") as error_info:
            RunFolder.create(output_dir)
        assert "\n" not in str(error_info.value)


def test_a_folder_that_takes_no_files(tmp_path: Path) -> None:
    (tmp_path / "options.json" / "in the way").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"--output_dir {tmp_path} cannot be written: "):
        _open(tmp_path)


def _local_folder(path: Path, text: str, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


@pytest.mark.parametrize("by_uri", [False, True])
def test_a_folder_replaces_the_one_before(by_uri: bool, tmp_path: Path) -> None:
    first = _local_folder(tmp_path / "first", "1", "a.json", "only-first.bin", "sub/deep/b")
    second = _local_folder(tmp_path / "second", "2", "a.json", "sub/c")
    out = tmp_path / "out"
    folder = RunFolder.create(out.as_uri() if by_uri else str(out))
    folder.write_folder("adapter_2", first)
    for source in (first, second, first):
        folder.write_folder("adapter", source)
        assert _tree(out / "adapter") == _tree(source)
        assert folder.has("adapter")
    assert _tree(out / "adapter_2") == _tree(first)
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "adapter_2"]
    folder.delete("adapter")
    folder.delete("adapter")
    assert not folder.has("adapter")
    assert _tree(out / "adapter_2") == _tree(first)


def test_a_folder_that_was_not_copied_to_its_end_does_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (_local_folder(tmp_path / text, text, "a", "b/c") for text in ("1", "2"))
    out = tmp_path / "out"
    folder = RunFolder.create(str(out))
    folder.write_folder("adapter", first)

    def die_midway(source: str, target: str, **filesystems: Any) -> None:
        Path(target, "a").write_text("2")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "copy_files", die_midway)
        with pytest.raises(KeyboardInterrupt):
            folder.write_folder("adapter", second)
    assert _tree(out / "adapter") == _tree(first)
    assert len(list(out.iterdir())) == 2
    (out / f".adapter_2-{'0' * 32}.tmp").mkdir()  # that of another name, perhaps being written
    folder.write_folder("adapter", second)
    assert _tree(out / "adapter") == _tree(second)
    assert sorted(path.name for path in out.iterdir()) == [f".adapter_2-{'0' * 32}.tmp", "adapter"]
    folder.remove_leftovers()
    assert [path.name for path in out.iterdir()] == ["adapter"]


@pytest.mark.parametrize("name", ["file", "file/below", "file/far/below"])
def test_a_folder_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a regular file")
    for output_dir in (str(tmp_path / name), (tmp_path / name).as_uri()):
        with pytest.raises(ValueError, match="cannot be written: ") as error_info:
            _open(output_dir)
        assert str(error_info.value).startswith(f"--output_dir {output_dir} cannot be written: ")
        assert "\n" not in str(error_info.value)


@pytest.mark.parametrize("uri", ["s4://bucket/x", "file://relative/x", "file:///a b"])
def test_a_uri_that_cannot_be_opened(uri: str) -> None:
    with pytest.raises(ValueError, match="cannot be written: "):
        _open(uri)


def test_a_relative_folder_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert _open("a/../b").uri == str(tmp_path / "b")
    assert _open("~/c").uri == str(tmp_path / "home" / "c")


# Files


def test_nothing_is_ever_seen_half_written(tmp_path: Path) -> None:
    folder = RunFolder.create(str(tmp_path))
    texts = [letter * 400_000 for letter in "ab"]
    folder.write_text("below/file.txt", texts[0])
    done = threading.Event()

    def write() -> None:
        for turn in range(60):
            folder.write_text("below/file.txt", texts[turn % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    num_reads = 0
    while not done.is_set():
        assert (tmp_path / "below" / "file.txt").read_text() in texts
        num_reads += 1
    writer.join()
    assert num_reads > 5
    assert _tree(tmp_path).keys() == {"below/file.txt"}


def test_json_is_read_back_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = RunFolder.create(str(tmp_path))
    assert folder.read_json("a.json", cure="delete it") is None
    folder.write_json("a.json", {"name": "Grüße", "values": (1, None)})
    assert folder.read_json("a.json", cure="delete it") == {"name": "Grüße", "values": [1, None]}
    folder.write_text("a.json", "[")
    with pytest.raises(ValueError, match=rf"{tmp_path}/a.json is damaged \(not JSON: .+\); delete it$"):
        folder.read_json("a.json", cure="delete it")
