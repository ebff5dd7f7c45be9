"""What is known of a family of models is found by its config, and other models run by what holds for all."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

from helpers.families import TINY
from helpers.families.table import render_table
from helpers.paths import ROOT
from vlmray.errors import OptionError
from vlmray.models import loading
from vlmray.models.checks import check_model_folder, check_packages
from vlmray.models.families import ANY, FAMILIES, family_of
from vlmray.models.loading import load_qwen_vl_model_and_processor

WITHOUT_A_NAME = ("pixtral",)  # LLaVA around another tower


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name not in WITHOUT_A_NAME])
def test_a_known_type_is_one_that_transformers_has(model_type: str) -> None:
    assert CONFIG_MAPPING[model_type] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    assert family_of(AutoConfig.for_model(model_type)) is family_of({"model_type": model_type})
    assert family_of({"model_type": model_type}) is FAMILIES[model_type]


def test_every_family_has_a_tiny_model_that_shows_what_is_said_of_it() -> None:
    assert TINY.keys() == FAMILIES.keys()


def test_llava_around_another_tower_is_another_family() -> None:
    config = {"model_type": "llava", "vision_config": {"model_type": "pixtral"}}
    assert family_of(config) is FAMILIES["pixtral"]
    assert family_of({**config, "vision_config": {}}) is FAMILIES["llava"] is not FAMILIES["pixtral"]


def test_of_another_type_is_known_what_holds_for_all(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert family_of({"model_type": "newer_vl"}) is ANY
    assert not any([ANY.shares_prefix, ANY.takes_image_features, ANY.packs_attention])
    with pytest.raises(NotImplementedError, match="the vision tower of object"):
        ANY.vision_tower(object())
    with caplog.at_level(logging.WARNING, "vlmray.models.loading"):
        load_qwen_vl_model_and_processor(str(tiny_model))
        assert "tested families" not in caplog.text
        monkeypatch.setattr(loading, "family_of", lambda config: ANY)
        load_qwen_vl_model_and_processor(str(tiny_model))
    assert "model type 'qwen2_5_vl' is not among the tested families (docs/families.md)" in caplog.text


def test_packages_that_a_processor_needs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    absent = {"torchvision", "num2words"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    check_packages("X", {"model_type": "qwen2_5_vl"})
    with pytest.raises(OptionError) as caught:
        check_packages("X", {"model_type": "smolvlm"})
    assert str(caught.value) == (
        "--model_id X: the processor of smolvlm needs torchvision and num2words; pip install torchvision "
        "num2words, or 'vlmray[vision]'"
    )
    absent.clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    check_packages("X", {"model_type": "smolvlm"})


@pytest.mark.parametrize("model_type", ["fast_vlm", "gemma3n", "perception_lm"])
def test_a_vision_encoder_that_is_of_timm_is_refused_without_it(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AutoConfig.for_model(model_type).to_dict()
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "timm" else found(name))
    with pytest.raises(OptionError) as caught:
        check_packages("X", config)
    assert (
        str(caught.value) == f"--model_id X: the vision encoder of {model_type} needs timm; pip install timm"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    check_packages("X", config)


def test_a_folder_is_refused_for_what_its_processor_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "config.json").write_text('{"model_type": "lfm2_vl"}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(OptionError, match="the processor of lfm2_vl needs torchvision; pip install torchv"):
        check_model_folder(str(tmp_path))


def test_the_documented_table_is_what_the_contract_test_holds() -> None:
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    found = text.partition("<!-- families -->\n")[2].partition("<!-- /families -->")[0]
    assert found == render_table(), "PYTHONPATH=.:tests python -m helpers.families.table writes it"
