"""A tiny model, and engines over it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.engines import load
from vlmray.engines.transformers.engine import TransformersEngine
from vlmray.models.processors import load_processor


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return load(tiny_model)


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    return load_processor(str(tiny_model))


@pytest.fixture
def make_engine(model: Any, processor: Any) -> Iterator[Callable[..., TransformersEngine]]:
    engines: list[TransformersEngine] = []

    def make(**options: Any) -> TransformersEngine:
        engines.append(TransformersEngine(model, processor, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(params=[1.0, 1.05, 1.5])
def repetition_penalty(request: pytest.FixtureRequest, model: Any) -> Iterator[float]:
    """Run the test under each penalty in the model's generation config; real Qwen2.5-VL has 1.05."""
    before = copy.deepcopy(model.generation_config)
    model.generation_config.repetition_penalty = request.param
    yield request.param
    model.generation_config = before


@pytest.fixture(scope="module")
def tiny_llava(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA: another family, whose images are (N, 3, H, W) and whose processor has no video part."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlavaConfig, LlavaProcessor, Qwen2Config
    from transformers import LlavaForConditionalGeneration as Llava

    folder = tmp_path_factory.mktemp("models") / "llava"
    qwen = load_processor(str(tiny_model))
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
        ),
        tokenizer=qwen.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<|image_pad|>",
        num_additional_image_tokens=1,
        chat_template=qwen.chat_template,
    ).save_pretrained(folder)
    shared: dict[str, Any] = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=32, image_size=56, patch_size=14, **shared),
        text_config=Qwen2Config(vocab_size=512, hidden_size=64, num_key_value_heads=1, **shared),
        image_token_index=qwen.image_token_id,
    )
    torch.manual_seed(0)
    model = Llava(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(
                parameter, std=1.0 if "embed" in name else 1.5 / parameter[0].numel() ** 0.5
            )
    model.generation_config.update(
        eos_token_id=qwen.tokenizer.eos_token_id, pad_token_id=qwen.tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    return folder
