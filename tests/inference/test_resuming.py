"""What an output folder is resumed for: the same weights and the same data under the same names."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from vlmray.builtin import charts
from vlmray.config import InferConfig
from vlmray.dataset.sources import open_source
from vlmray.inference.plan import InferenceRun, plan_inference
from vlmray.inference.result_folder import RESULT_SCHEMA
from vlmray.models import source as models
from vlmray.storage import fingerprints


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def _plan(folder: Path, **options: Any) -> InferenceRun:
    defaults = {"engine": "fake", "model_id": "fake", "dataset_name": "charts?num_rows=3"}
    return plan_inference(
        InferConfig(**{**defaults, "output_dir": str(folder), "sample_slices": "[:]", **options})
    )


def _answer_one(run: InferenceRun) -> None:
    """Leave what a run leaves that is cut off after its first row."""
    row = {**dict.fromkeys(RESULT_SCHEMA.names), "sample_id": "test-000000", "row_index": 0}
    run.folder.save([row], [{}], [()])


def _refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(ValueError, match="--output_dir") as refused:
        _plan(folder, **options)
    message = str(refused.value)
    assert message.startswith(f"--output_dir {folder} ")
    assert message.endswith("; choose another folder, or pass --overwrite to delete it")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["a folder", "builtin"])
def test_weights_that_changed_under_their_name_are_refused(
    name: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    monkeypatch.setattr(models, "BUILTIN_FOLDER", model)
    model_id = name if name == "builtin" else str(model)
    options = {"engine": "transformers", "model_id": model_id}
    _answer_one(_plan(tmp_path / "out", **options))
    assert list(_plan(tmp_path / "out", **options).pending) == [1, 2]
    weights = load_file(model / "model.safetensors")
    save_file({key: value + 1 for key, value in weights.items()}, model / "model.safetensors")
    message = _refusal(tmp_path / "out", **options)
    assert f"holds another run (the weights of model_id {model_id!r} changed: fingerprint was" in message
    assert len(_plan(tmp_path / "out", overwrite=True, **options).pending) == 3


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json",
        "tokenizer.json", "chat_template.jinja",
    ],
)  # fmt: skip
def test_a_model_of_which_a_file_was_edited_is_refused(name: str, tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    options = {"engine": "transformers", "model_id": str(model)}
    _answer_one(_plan(tmp_path / "out", **options))
    text = (model / name).read_text()
    (model / name).write_text(text)  # only its time changes
    assert len(_plan(tmp_path / "out", **options).pending) == 2
    (model / name).write_text(text + "\n")
    assert "(the weights of model_id" in _refusal(tmp_path / "out", **options)


def test_an_adapter_that_was_trained_again_is_refused(
    tiny_model: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
    options = {"engine": "transformers", "model_id": str(tiny_model), "adapter": str(adapter)}
    _answer_one(_plan(tmp_path / "out", **options))
    assert len(_plan(tmp_path / "out", **options).pending) == 2
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({key: value + 1 for key, value in weights.items()}, adapter / "adapter_model.safetensors")
    assert f"(the weights of adapter {str(adapter)!r} changed: " in _refusal(tmp_path / "out", **options)


def _rows(*answers: str) -> str:
    return "".join(json.dumps({"question": "How many?", "answer": answer}) + "\n" for answer in answers)


def test_a_dataset_file_that_was_edited_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(_rows("1", "2"))
    options = {"dataset_name": str(path)}
    _answer_one(_plan(tmp_path / "out", **options))
    os.utime(path, (1, 1))  # as a copy may have it
    assert list(_plan(tmp_path / "out", **options).pending) == [1]
    for answers in (("1", "3"), ("1", "2", "3")):  # edited, and grown at its end
        path.write_text(_rows(*answers))
        message = _refusal(tmp_path / "out", **options)
        assert f"holds another run (the data of dataset_name {str(path)!r} changed: fingerprint" in message
    assert "model_id was 'fake', now 'fake?answer=7')" in _refusal(
        tmp_path / "out", model_id="fake?answer=7", **options
    )
    path.write_text(_rows("1", "2"))
    assert list(_plan(tmp_path / "out", **options).pending) == [1]


def test_a_folder_of_an_earlier_version_is_refused_with_the_reason(tmp_path: Path) -> None:
    _answer_one(_plan(tmp_path))
    options = json.loads((tmp_path / "options.json").read_text())
    del options["dataset_fingerprint"]
    (tmp_path / "options.json").write_text(json.dumps({**options, "model_fingerprint": "0123456789abcdef"}))
    assert "was written by an earlier version of vlmray (it did not record what tells" in _refusal(tmp_path)
    assert "model_id was 'fake', now 'fake?answer=7'" in _refusal(tmp_path, model_id="fake?answer=7")


# What a source's fingerprint notices


def _pictures(folder: Path) -> Callable[[], object]:
    split = folder / "test"
    split.mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(split / f"{number}.png")
    lines = [json.dumps({"file_name": f"{n}.png", "question": "?"}) for n in range(2)]
    (split / "metadata.jsonl").write_text("\n".join(lines))
    return lambda: Image.new("RGB", (8, 8), (9, 0, 0)).save(split / "1.png")


def _saved_to_disk(folder: Path) -> Callable[[], object]:
    rows = [datasets.Dataset.from_dict({"question": [text]}) for text in "ab"]
    datasets.DatasetDict(test=rows[0]).save_to_disk(str(folder))
    return lambda: rows[1].save_to_disk(str(folder / "test"))


def _parquet(folder: Path) -> Callable[[], object]:
    folder.mkdir()
    pq.write_table(pa.table({"question": ["a"]}), folder / "test.parquet")
    return lambda: pq.write_table(pa.table({"question": ["b"]}), folder / "test.parquet")


@pytest.mark.parametrize("make", [_pictures, _saved_to_disk, _parquet])
def test_folders(
    make: Callable[[Path], Callable[[], object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = make(tmp_path / "data")

    def fingerprint(name: str = "data") -> str:
        return open_source(str(tmp_path / name), "test").fingerprint()

    before = fingerprint()
    (tmp_path / "data" / ".hidden").touch()
    shutil.copytree(tmp_path / "data", tmp_path / "copy", copy_function=shutil.copyfile)
    assert before == fingerprint() == fingerprint("copy")
    monkeypatch.setattr(fingerprints, "_MOST_BYTES", 0)  # as if it were large: nothing is read
    listed = fingerprint()
    assert listed == fingerprint() != before
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    change()
    assert fingerprint() not in (before, listed)


@pytest.mark.parametrize("random_access", [False, True])
def test_files_behind_a_uri(random_access: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMRAY_CACHE", str(tmp_path / "vlmray"))
    change = _parquet(tmp_path / "data")
    uri = (tmp_path / "data").as_uri()

    def fingerprint(random_access: bool = False) -> str:
        return open_source(uri, "test", random_access=random_access).fingerprint()

    before = fingerprint()
    assert before == fingerprint(random_access)
    os.utime(tmp_path / "data" / "test.parquet", (1, 1))
    later = fingerprint(random_access)
    assert later != before
    change()
    os.utime(tmp_path / "data" / "test.parquet", (1, 1))  # same size, and same time: the footer tells
    assert fingerprint(random_access) not in (before, later)


def test_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(name: str, split: str = "test") -> str:
        return open_source(name, split).fingerprint()

    same = {fingerprint("charts?num_rows=9&seed=1"), fingerprint("charts?seed=1&num_rows=9")}
    assert len(same) == 1
    others = {fingerprint("charts?num_rows=9&seed=2"), fingerprint("charts?num_rows=9&seed=1", "train")}
    monkeypatch.setattr(charts, "VERSION", charts.VERSION + 1)
    assert len({*same, *others, fingerprint("charts?num_rows=9&seed=1")}) == 4


def test_a_dataset_of_the_hub_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "datasets--owner--known" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "test.jsonl").write_text(_rows("1"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("vlmray.storage.hub.cached_snapshot", lambda *_: snapshot)
    assert open_source("owner/known", "test").fingerprint() == commit
    os.utime(snapshot / "test.jsonl", (1, 1))  # fetched again
    assert open_source("owner/known", "test").fingerprint() == commit


# Rows and the images that they name


def _jsonl(folder: Path, *questions: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "rows.jsonl"
    rows = [{"image": f"{at}.png", "question": text, "answer": "a"} for at, text in enumerate(questions)]
    path.write_text("\n".join(map(json.dumps, rows)))
    for at in range(len(questions)):
        Image.new("RGB", (8, 8), (at, 0, 0)).save(folder / f"{at}.png")
    return path


@pytest.mark.parametrize("edited", [["a?", "B?", "c?"], ["b?", "c?"]])
def test_rows_that_were_edited_or_deleted_are_refused(edited: list[str], tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "data", "a?", "b?", "c?")
    _answer_one(_plan(tmp_path / "out", dataset_name=str(path)))
    _jsonl(tmp_path / "data", *edited)
    assert f"the data of dataset_name '{path}' changed" in _refusal(tmp_path / "out", dataset_name=str(path))


@pytest.mark.parametrize("output_format", ["files", "parquet", "both"])
def test_a_row_is_asked_again_whose_image_file_was_replaced(output_format: str, tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "data", "a?", "b?", "c?")
    options = {"dataset_name": str(path), "output_format": output_format}
    run = _plan(tmp_path / "out", **options, sample_slices="[:2]")
    rows = [
        {**dict.fromkeys(RESULT_SCHEMA.names), "sample_id": f"test-{at:06d}", "row_index": at}
        for at in (0, 1)
    ]
    run.folder.save(rows, [{}, {}], [(), ()])
    assert list(_plan(tmp_path / "out", **options).pending) == [2]
    Image.new("RGB", (8, 8), "blue").save(path.with_name("1.png"))
    assert list(_plan(tmp_path / "out", **options, sample_slices="[:1]").pending) == []
    for _ in range(2):  # also where the run that noticed answered nothing
        assert list(_plan(tmp_path / "out", **options).pending) == [1, 2]
    path.with_name("0.png").unlink()
    assert list(_plan(tmp_path / "out", **options).pending) == [0, 1, 2]
    assert list(_plan(tmp_path / "out", **options, overwrite=True).pending) == [0, 1, 2]
    assert not list((tmp_path / "out").rglob("*_out.json")) + list((tmp_path / "out").rglob("*.parquet"))


def test_folders_whose_rows_name_no_files_record_none(tmp_path: Path) -> None:
    _plan(tmp_path / "out")
    assert not (tmp_path / "out" / "images.json").exists()


@pytest.mark.parametrize("name", ["0.png", "other/0.png"])
def test_training_goes_on_only_with_the_same_image_files(name: str, tmp_path: Path) -> None:
    from vlmray.config import FinetuneConfig
    from vlmray.finetune.plan import _fingerprint_images, open_training_data

    path = _jsonl(tmp_path / "data", "a?", "b?")
    (path.parent / "other").mkdir()
    shutil.copy(path.with_name("0.png"), path.parent / "other")
    path.write_text(path.read_text().replace("0.png", name))
    config = FinetuneConfig(dataset_name=str(path), model_id="tiny-random")
    found = []
    for color in ("red", None, "blue"):
        if color:
            Image.new("RGB", (8, 8), color).save(path.parent / name)
        found.append(_fingerprint_images(open_training_data(config).train))
    assert found[0] == found[1] != found[2]
    assert (
        _fingerprint_images(open_training_data(FinetuneConfig(dataset_name="charts?num_rows=4")).train)
        is None
    )
