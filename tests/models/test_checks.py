"""Folder checks: what is refused, with which words, and what a fingerprint notices."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import transformers
from safetensors.numpy import load_file, save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MODEL_CLASSES

from vlmray.builtin.random_models import build_tiny_random_model
from vlmray.models import source as models
from vlmray.models.checks import (
    REFUSED_TYPES,
    check_adapter_folder,
    check_model_folder,
    check_model_kind,
)
from vlmray.models.source import ModelSource, fingerprint
from vlmray.storage.hub import local_folder
from vlmray.storage.weights import read_tensor_shapes


@pytest.fixture(scope="module")
def wider_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_random_model(tmp_path_factory.mktemp("models") / "wider", hidden_size=192)


@pytest.fixture
def adapter(tiny_adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter that a test may change."""
    return Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))


def test_good_folders_and_hub_ids_pass(tiny_model: Path, tiny_adapter: Path) -> None:
    for model_id in (str(tiny_model), "Qwen/Qwen2.5-VL-7B-Instruct", "gpt2"):
        check_model_folder(model_id)
    check_adapter_folder(str(tiny_adapter), str(tiny_model))
    check_adapter_folder(str(tiny_adapter), "Qwen/Qwen2.5-VL-7B-Instruct")  # not here: loading will tell


def test_a_missing_folder_is_not_taken_for_a_hub_id() -> None:
    for model_id in ("/no/such/folder", "./model", "~/model", "outputs/run/model"):
        with pytest.raises(FileNotFoundError, match=f"--model_id {model_id}: no such folder"):
            check_model_folder(model_id)
    for model_id in ("", "a b", "org/name?", "org/.."):
        with pytest.raises(ValueError, match="neither a folder nor a hub id"):
            check_model_folder(model_id)


def test_pickle_weights_are_refused_with_the_way_out(tmp_path: Path, adapter: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no \*.safetensors weights in this folder$"):
        check_model_folder(str(tmp_path))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"only pytorch_model.bin.*save_pretrained"):
        check_model_folder(str(tmp_path))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no adapter_model.safetensors, only adapter_model.bin"):
        check_adapter_folder(str(adapter), "gpt2")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "florence2"},
        {"model_type": "new", "is_encoder_decoder": True},
        {"model_type": "instructblip", "text_config": {"model_type": "t5"}},
        {"model_type": "new", "text_config": {"is_encoder_decoder": True}},
    ],
)
def test_encoder_decoders_are_refused_in_one_line(config: dict[str, object], hub_snapshot: Path) -> None:
    (hub_snapshot / "config.json").write_text(json.dumps(config))
    (hub_snapshot / "model.safetensors").touch()
    for model_id in (str(hub_snapshot), "org/name"):
        with pytest.raises(
            ValueError, match="is an encoder-decoder model; vlmray runs decoder-only"
        ) as caught:
            check_model_folder(model_id)
        assert str(caught.value).startswith(f"--model_id {model_id}: {config['model_type']} is an encoder")
        assert "\n" not in str(caught.value)


def test_decoders_are_not_refused() -> None:
    for config in (
        {"model_type": "qwen2_5_vl"},
        {"model_type": "blip-2", "text_config": {"model_type": "opt"}, "is_encoder_decoder": False},
        {"model_type": "new", "text_config": None},
        {},
    ):
        check_model_kind("X", config)


def test_the_refused_types_are_those_of_the_installed_transformers() -> None:
    declared = {name for name in MODEL_CLASSES if transformers.CONFIG_MAPPING[name].is_encoder_decoder}
    captioners_with_t5 = {"t5"}  # BLIP-2 and InstructBLIP with it: their text model says what they are
    others = {"blip", "diffusion_gemma", "evolla", "instructblipvideo", "pi0"}
    assert declared | captioners_with_t5 | others == REFUSED_TYPES
    classes = {name: getattr(transformers, class_name) for name, class_name in MODEL_CLASSES.items()}
    generative = {name for name, each in classes.items() if issubclass(each, transformers.GenerationMixin)}
    assert MODEL_CLASSES.keys() - generative <= REFUSED_TYPES


def test_an_adapter_given_as_a_model_is_named_as_such(tiny_adapter: Path) -> None:
    with pytest.raises(FileNotFoundError, match="that is an adapter: pass it as --adapter"):
        check_model_folder(str(tiny_adapter))


def test_incomplete_adapter_folders_are_refused(tmp_path: Path, adapter: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        check_adapter_folder(str(tmp_path / "none"), "gpt2")
    with pytest.raises(FileNotFoundError, match=r"no adapter_config.json"):
        check_adapter_folder(str(tmp_path), "gpt2")
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json is not JSON"):
        check_adapter_folder(str(adapter), "gpt2")
    (adapter / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ValueError, match="peft_type is IA3"):
        check_adapter_folder(str(adapter), "gpt2")


def test_a_truncated_weight_file_is_refused(adapter: Path, tiny_model: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        check_adapter_folder(str(adapter), str(tiny_model))


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", LFS_POINTER, "is a Git LFS pointer, not the file itself; run `git lfs pull`"),
        ("model.safetensors", "", "model.safetensors is empty; write or copy it again"),
        ("model.safetensors", "PK\x03\x04" + "x" * 100, "is not a complete safetensors file"),
        ("model.safetensors", None, r"no \*.safetensors weights in this folder"),
        ("tokenizer.json", LFS_POINTER, "tokenizer.json is a Git LFS pointer"),
        ("tokenizer.json", '{"version": "1.0", "trunc', "tokenizer.json is not JSON"),
        ("tokenizer.json", None, r"no tokenizer in this folder \(tokenizer.json or the like\); copy it"),
        ("preprocessor_config.json", None, "no image processor in this folder"),
        ("preprocessor_config.json", "[]", "preprocessor_config.json holds a list, expected an object"),
        ("chat_template.jinja", None, "no chat template in this folder"),
        ("chat_template.jinja", "", "no chat template in this folder"),
        ("config.json", LFS_POINTER, "config.json is a Git LFS pointer"),
        ("config.json", '{"model_type": ', "config.json is not JSON"),
        ("config.json", "\ufeff<html>", "config.json is not JSON"),
        ("generation_config.json", "{", "generation_config.json is not JSON"),
        ("model.safetensors.index.json", LFS_POINTER, "index.json is a Git LFS pointer"),
        ("model.safetensors.index.json", "{}", "is not an index of weights"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}',
            "lacks 1 of 2 weight files, model-2.safetensors among them",
        ),
    ],
)
def test_an_incomplete_model_folder_is_refused_in_one_line(
    name: str, content: str | None, message: str, tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    check_model_folder(str(model))
    (model / name).unlink(missing_ok=True)
    if content is not None:
        (model / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        check_model_folder(str(model))
    assert str(caught.value).startswith("--model_id")
    assert "\n" not in str(caught.value)


def test_a_file_of_a_model_is_not_its_folder(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is a file; pass the folder that it is in"):
        check_model_folder(f"{tiny_model}/config.json")


def test_weights_that_end_early_are_refused_with_both_sizes(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"it has {len(whole) - 1:,} of {len(whole):,} bytes"):
        check_model_folder(str(model))


def test_shards_without_their_index_are_no_model(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    with pytest.raises(
        ValueError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        check_model_folder(str(model))


def test_an_adapter_that_is_a_pointer_is_named_as_one(adapter: Path, tiny_model: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (adapter / name).write_text(LFS_POINTER)
        with pytest.raises(ValueError, match=f"{name}.* is a Git LFS pointer"):
            check_adapter_folder(str(adapter), str(tiny_model))


def test_an_adapter_of_another_base_is_refused_in_one_line(
    tiny_adapter: Path, tiny_model: Path, wider_model: Path
) -> None:
    with pytest.raises(ValueError, match="input width 256 in the adapter and 384 in the model") as caught:
        check_adapter_folder(str(tiny_adapter), str(wider_model))
    message = str(caught.value)
    assert str(tiny_model) in message
    assert f"--model_id {wider_model}" in message
    assert "\n" not in message


def test_an_adapter_of_a_base_with_other_layers_is_refused(adapter: Path, tiny_model: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    deeper = {name.replace("layers.1.", "layers.7."): array for name, array in weights.items()}
    save_file(deeper, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"changes layers\.7\..*, which the model does not have"):
        check_adapter_folder(str(adapter), str(tiny_model))
    save_file({"other": weights.popitem()[1]}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="it holds no LoRA weights"):
        check_adapter_folder(str(adapter), str(tiny_model))


def test_a_base_that_moved_is_still_the_base(tiny_adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    check_adapter_folder(str(tiny_adapter), str(moved))


def test_shapes_are_read_from_the_header(tiny_adapter: Path) -> None:
    shapes = read_tensor_shapes(tiny_adapter / "adapter_model.safetensors")
    arrays = load_file(tiny_adapter / "adapter_model.safetensors")
    assert shapes == {name: array.shape for name, array in arrays.items()}


def test_the_hub_cache_is_found(hub_snapshot: Path) -> None:
    assert local_folder("org/name") is None
    (hub_snapshot / "config.json").write_text("{}")
    assert local_folder("org/name") == hub_snapshot
    assert local_folder("org/other") is None
    assert local_folder("/no/such/folder") is None  # nor a name that the hub could have


def test_a_fingerprint_changes_when_and_only_when_the_checkpoint_does(
    adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    before = fingerprint(adapter)
    assert before == fingerprint(Path(shutil.copytree(adapter, tmp_path / "copy")))
    (adapter / "training.json").write_text("{}")
    assert before == fingerprint(adapter)  # how long training took changes no answer
    _retrain(adapter / "adapter_model.safetensors")
    assert fingerprint(adapter) != before  # same names and sizes, other values

    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    seen = {fingerprint(tiny_model)}
    assert {fingerprint(model)} == seen
    for change in ("config.json", "tokenizer_config.json"):
        config = json.loads((model / change).read_text())
        (model / change).write_text(json.dumps({**config, "new": True}))
        seen.add(fingerprint(model))
    _retrain(model / "model.safetensors")
    assert len(seen | {fingerprint(model)}) == 4


def _retrain(weights: Path) -> None:
    """Change a tensor, and neither its name nor its shape."""
    tensors = load_file(weights)
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first] + 1}, weights, metadata={"format": "pt"})


def test_every_tensor_of_a_large_file_counts(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_WHOLE_BYTES", 0)
    weights = tmp_path / "model.safetensors"
    shutil.copy(tiny_model / weights.name, weights)
    tensors = load_file(weights)
    seen = {fingerprint(tmp_path)}
    assert 1 < len(tensors) <= 256
    for name, tensor in tensors.items():
        save_file({**tensors, name: tensor + 1}, weights, metadata={"format": "pt"})
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 1 + len(tensors)
    monkeypatch.setattr(models, "_MOST_BLOCKS", 3)  # of more tensors some do
    assert len(fingerprint(tmp_path)) == 16


def test_a_fingerprint_reads_little_of_a_large_file(tmp_path: Path) -> None:
    half = 4 << 30
    header = {
        name: {"dtype": "U8", "shape": [half], "data_offsets": [half * number, half * (number + 1)]}
        for number, name in enumerate("ab")
    }
    text = json.dumps(header).encode()
    weights = tmp_path / "model.safetensors"
    with weights.open("wb") as file:  # sparse: it takes no room
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + 2 * half)
    started = time.perf_counter()
    before = fingerprint(tmp_path)
    assert time.perf_counter() - started < 1
    with weights.open("r+b") as file:
        file.seek(8 + len(text) + half + half // 2)
        file.write(b"trained")
    assert fingerprint(tmp_path) != before


def test_the_built_in_model_is_known_by_its_weights(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = ModelSource.open("builtin").fingerprint
    assert released == ModelSource.find("builtin").fingerprint
    monkeypatch.setattr(models, "BUILTIN_FOLDER", Path(shutil.copytree(tiny_model, tmp_path / "next")))
    following = ModelSource.open("builtin").fingerprint
    _retrain(tmp_path / "next" / "model.safetensors")
    assert len({released, following, ModelSource.open("builtin").fingerprint}) == 3


def test_a_model_of_the_hub_is_known_by_its_commit(
    hub_snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its files are here, or will be once a worker has fetched them."""
    monkeypatch.setattr(models.hub, "check_reachable", lambda *_, **__: "abc")
    source = ModelSource.open("org/name")
    assert (source.folder, source.path, source.fingerprint) == (None, "org/name", "abc")
    (hub_snapshot / "config.json").write_text("{}")
    source = ModelSource.open("org/name")
    assert (source.folder, source.path, source.fingerprint) == (hub_snapshot, "org/name", "abc")
    assert ModelSource(name="a", path="a").fingerprint != ModelSource(name="b", path="b").fingerprint
