"""Kept vision features: training on them is training on pixels, and each image is encoded once."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from helpers.finetuning import curve, make_config, train
from helpers.trainings import PIXELS
from vlmray.models.families.base import Family
from vlmray.models.processors import load_processor
from vlmray.training import vision_cache
from vlmray.training.collator import DataCollatorForVLMSFT
from vlmray.training.vision_cache import VisionCache
from vlmray.training.worker import Outcome

pytestmark = pytest.mark.usefixtures("spare_time")

NUM_IMAGES = 6
EPOCHS = {"sample_slices": f"[:{2 * NUM_IMAGES}:2]", "num_train_epochs": 3}  # two rows ask about one image


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    return load_processor(str(tiny_model), max_pixels=PIXELS)


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(tiny_model).eval().requires_grad_(False)


@pytest.fixture
def on_pixels(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """A run in which the model sees pixels, as without all this."""
    with monkeypatch.context() as patch:
        patch.setattr(vision_cache, "family_of", lambda model_type: Family())
        return train(make_config(tiny_model, **EPOCHS))


def make_feature(name: str, *images: Image.Image) -> dict[str, Any]:
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": f"What is {name}?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": name}]}
    return {"sample_id": name, "messages": [{"role": "user", "content": parts}, answer], "images": images}


def make_image(shade: int, size: tuple[int, int] = (56, 56)) -> Image.Image:
    return Image.new("RGB", size, (shade, 255 - shade, 40))


def differ(found: Outcome, expected: Outcome) -> float:
    return max(abs(a - b) for a, b in zip(curve(found), curve(expected), strict=True))


# ---------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------


def test_losses_are_those_on_pixels_and_each_image_is_encoded_once(
    tiny_model: Path, on_pixels: Outcome
) -> None:
    kept = train(make_config(tiny_model, **EPOCHS))
    assert differ(kept, on_pixels) < 1e-5
    assert on_pixels.num_images is None
    assert (kept.num_encoded, kept.num_images) == (NUM_IMAGES, 3 * NUM_IMAGES)
    assert len(set(curve(kept))) > 1


@pytest.mark.parametrize("gib", [0, 3e-6])  # of 6 images, none or a few
def test_what_does_not_fit_is_encoded_every_time(
    tiny_model: Path, on_pixels: Outcome, gib: float, caplog: pytest.LogCaptureFixture
) -> None:
    found = train(make_config(tiny_model, vision_cache_gib=gib, **EPOCHS))
    assert differ(found, on_pixels) < 1e-5
    assert found.num_encoded is not None
    if gib:
        assert NUM_IMAGES < found.num_encoded < 3 * NUM_IMAGES
    else:
        assert found.num_encoded == 3 * NUM_IMAGES
    assert caplog.text.count("--vision_cache_gib is used up") == (gib > 0)


def test_a_full_disk_stops_nothing(
    tiny_model: Path, on_pixels: Outcome, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    found = train(make_config(tiny_model, **EPOCHS))
    assert differ(found, on_pixels) < 1e-5
    assert found.num_encoded == 3 * NUM_IMAGES
    warnings = [record.message for record in caplog.records if record.name == vision_cache.__name__]
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]


def test_an_evaluation_finds_what_an_earlier_one_kept(tiny_model: Path) -> None:
    options = {"sample_slices": "[:8:2]", "eval_slices": "[10:20:2]", "max_steps": 2, "eval_steps": 1}
    found = train(make_config(tiny_model, **options))
    assert found.num_images == 4 + 3 * 5  # one epoch, and an evaluation before, between and after
    assert found.num_encoded == 4 + 5


@pytest.mark.parametrize("option", ["lora_vision", "lora_merger"])
def test_what_is_trained_is_not_kept(tiny_model: Path, option: str) -> None:
    found = train(make_config(tiny_model, max_steps=2, sample_slices="[:2]", **{option: True}))
    assert found.num_images is None


def test_nothing_goes_back_through_a_frozen_tower(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient checkpointing makes the tower's inputs ask for gradients, and would encode images twice."""
    calls: list[bool] = []

    def count(block: Any, *args: Any) -> None:
        calls.append(torch.is_grad_enabled())

    loaded = AutoModelForImageTextToText.from_pretrained

    def load(*args: Any, **kwargs: Any) -> Any:
        found = loaded(*args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        model.model.visual.blocks[0].register_forward_pre_hook(count)
        return found

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", load)
    config = make_config(tiny_model, max_steps=3, per_device_train_batch_size=1, gradient_checkpointing=True)
    train(config)
    assert not any(calls)
    num_calls = len(calls)  # 3 batches, and the probes in the end
    monkeypatch.setattr(vision_cache, "family_of", lambda model_type: Family())
    train(config)
    assert len(calls) == num_calls + num_calls + 3  # or the test does not see what it looks for


def test_the_file_has_no_name(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache = VisionCache(model, 1e9)
    assert list(tmp_path.iterdir()) == []  # so that it goes with the process, however that ends
    del cache


# ---------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------


def test_any_mix_of_kept_and_new_images_gives_the_logits_of_pixels(model: Any, processor: Any) -> None:
    shades = [make_image(shade, size) for shade, size in ((10, (56, 56)), (90, (84, 56)), (170, (56, 112)))]
    first, second, third = shades
    plain = DataCollatorForVLMSFT(processor)
    cache = VisionCache(model, 1e9)
    cached = DataCollatorForVLMSFT(processor, vision_cache=cache)
    batches = [
        [make_feature("one", first)],
        [make_feature("new", second), make_feature("kept", first), make_feature("text")],
        [make_feature("both", first, third), make_feature("kept", second), make_feature("twice", third)],
        [make_feature("all", first, second), make_feature("kept", third)],
        [make_feature("text")],
    ]
    num_encoded = []
    for features in batches:
        batch = cache.encode(dict(cached(features)))
        expected = plain(features)
        for name in ("input_ids", "attention_mask", "labels", "mm_token_type_ids", "image_grid_thw"):
            assert (name in batch) == (name in expected)
            if name in expected:
                assert torch.equal(batch[name], expected[name])
        assert "pixel_values" not in batch
        with torch.no_grad():
            assert torch.allclose(model(**batch).logits, model(**expected).logits, atol=1e-4)
        num_encoded.append(cache.num_encoded)
    assert not cached.errors
    assert num_encoded == [1, 2, 3, 3, 3]
    assert cache.num_images == 1 + 2 + 4 + 3


def test_batches_that_were_made_ahead_still_fit(model: Any, processor: Any) -> None:
    """A batch is collated while the model encodes its images for an earlier one."""
    cache = VisionCache(model, 1e9)
    collator = DataCollatorForVLMSFT(processor, vision_cache=cache)
    features = [make_feature("a", make_image(1)), make_feature("b", make_image(2))]
    ahead = [dict(collator(features)), dict(collator(features[:1]))]
    found = [cache.encode(batch)["mm_encoder_outputs"]["image"].pooler_output for batch in ahead]
    late = cache.encode(dict(collator(features)))["mm_encoder_outputs"]["image"].pooler_output
    assert torch.equal(found[0][0], found[1][0])
    assert cache.num_encoded == 2
    assert all(torch.equal(one, other) for one, other in zip(late, found[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_come_back_bit_by_bit(tiny_model: Path, processor: Any, dtype: torch.dtype) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_model, dtype=dtype).requires_grad_(False)
    cache = VisionCache(model, 1e9)
    collator = DataCollatorForVLMSFT(processor, vision_cache=cache)
    features = [make_feature("a", make_image(1), make_image(2, (84, 84)))]
    first, second = (
        cache.encode(dict(collator(features)))["mm_encoder_outputs"]["image"].pooler_output for _ in range(2)
    )
    assert cache.num_encoded == 2
    assert [each.dtype for each in first] == [dtype] * 2
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_images_of_other_shape_are_others(model: Any, processor: Any) -> None:
    cache = VisionCache(model, 1e9)
    collator = DataCollatorForVLMSFT(processor, vision_cache=cache)
    wide, high = make_image(7, (112, 56)), make_image(7, (56, 112))  # of the same bytes
    cache.encode(dict(collator([make_feature("wide", wide)])))
    cache.encode(dict(collator([make_feature("high", high)])))
    assert cache.num_encoded == 2
