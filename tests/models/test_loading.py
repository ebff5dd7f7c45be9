"""Loading models, processors and adapters, and the plain way to generate."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers.adapters import build_adapter
from helpers.paths import REAL_PROCESSOR, needs_real_processor
from vlmray.builtin.random_models import build_tiny_random_model
from vlmray.engines.transformers.engine import TransformersEngine
from vlmray.errors import OptionError
from vlmray.models import loading, processors
from vlmray.models.adapters import attach_adapter
from vlmray.models.loading import generate_text_from_sample, load_qwen_vl_model_and_processor
from vlmray.models.processors import load_processor
from vlmray.schema import GenerationRequest

MESSAGES: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "How many? 2,008 % é 你好"}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?\n"}]}],
    [
        {"role": "system", "content": "Answer briefly."},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "The first."}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure? "}, {"type": "image"}]},
    ],
]


def picture(width: int, height: int) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


def ask(text: str = "What is the value of Germany?", *, image: bool = True) -> GenerationRequest:
    parts = [{"type": "image"}] * image + [{"type": "text", "text": text}]
    images = [picture(120, 90)] * image
    messages = [{"role": "user", "content": parts}]
    return GenerationRequest(request_id="a", messages=messages, images=images, max_new_tokens=20)


def count_visual_tokens(processor: Any, image: Image.Image) -> int:
    prompt = processor.apply_chat_template(MESSAGES[1], add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[image], return_tensors="pt")
    assert inputs["pixel_values"].shape[0] == 4 * int((inputs["input_ids"] == processor.image_token_id).sum())
    return int((inputs["input_ids"] == processor.image_token_id).sum())


def test_a_model_comes_in_eval_mode_with_a_left_padding_pil_processor(tiny_model: Path) -> None:
    model, processor = load_qwen_vl_model_and_processor(str(tiny_model))
    assert not model.training
    assert torch.cuda.is_available() or model.dtype == torch.float32
    assert processor.tokenizer.padding_side == "left"
    assert processor.image_processor.backend == "pil"
    half, _ = load_qwen_vl_model_and_processor(str(tiny_model), dtype="bfloat16")
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantized_model_generates(tiny_model: Path, tiny_adapter: Path, quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    model, processor = load_qwen_vl_model_and_processor(
        str(tiny_model), quantization=quantization, adapter=str(tiny_adapter)
    )
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[quantization] in kinds
    engine = TransformersEngine(model, processor)
    completions = engine.generate([ask(), ask(image=False)])
    assert [c.error for c in completions] == [None, None]
    with model.disable_adapter():
        base, _ = generate_text_from_sample(model, processor, ask(), max_new_tokens=20)
    assert base != generate_text_from_sample(model, processor, ask(), max_new_tokens=20)[0]


def test_dora_on_8_bit_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    adapter = build_adapter(tmp_path / "dora", tiny_model, use_dora=True)
    model, processor = load_qwen_vl_model_and_processor(str(tiny_model), quantization="8bit")
    engine = TransformersEngine(model, processor)
    with pytest.raises(ValueError, match=r"is a DoRA, .* 8-bit weights; pass --quantization 4bit or none"):
        engine.load_adapter("dora", str(adapter))
    assert engine.generate([ask()])[0].error is None


def test_pixel_limits_take_effect(tiny_model: Path) -> None:
    large, small = picture(560, 560), picture(56, 56)
    free = load_processor(str(tiny_model))
    assert (count_visual_tokens(free, large), count_visual_tokens(free, small)) == (400, 4)
    bound = load_processor(str(tiny_model), min_pixels=9 * 784, max_pixels=100 * 784)
    assert (count_visual_tokens(bound, large), count_visual_tokens(bound, small)) == (100, 9)
    lower = load_processor(str(tiny_model), max_pixels=64 * 784)
    assert (count_visual_tokens(lower, large), count_visual_tokens(lower, small)) == (64, 4)


def test_impossible_pixel_limits_are_refused(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="--min_pixels 5000 must be above 0 and not above --max_pixels 4000"):
        load_processor(str(tiny_model), min_pixels=5000, max_pixels=4000)
    with pytest.raises(ValueError, match="--max_pixels 100"):
        load_processor(str(tiny_model), max_pixels=100)


def test_without_torchvision_the_processor_still_loads_and_saves(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library")

    monkeypatch.setattr(processors.AutoProcessor, "from_pretrained", refuse)
    processor = load_processor(str(tiny_model))
    assert count_visual_tokens(processor, picture(56, 84)) == 6
    processor.save_pretrained(tmp_path)
    shutil.copy(tiny_model / "config.json", tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == "Qwen2_5_VLProcessor"  # AutoProcessor elsewhere finds it
    assert count_visual_tokens(load_processor(str(tmp_path)), picture(56, 84)) == 6


def test_a_missing_package_that_is_not_for_video_is_reported(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ImportError("requires the sentencepiece library")

    monkeypatch.setattr(processors.AutoProcessor, "from_pretrained", refuse)
    monkeypatch.setattr(processors, "PROCESSOR_MAPPING", {})
    with pytest.raises(OptionError, match=r"does not load \(requires the sentencepiece library\); install"):
        load_processor(str(tiny_model))


def test_with_torchvision_images_still_take_the_pil_path(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(
        image_processor=SimpleNamespace(backend="torchvision"),
        tokenizer=SimpleNamespace(padding_side="right"),
    )
    monkeypatch.setattr(processors.AutoProcessor, "from_pretrained", lambda *a, **k: found)
    processor = load_processor(str(tiny_model))
    assert type(processor.image_processor).__name__ == "Qwen2VLImageProcessorPil"
    if importlib.util.find_spec("torchvision") is None:
        return
    monkeypatch.undo()
    assert load_processor(str(tiny_model)).image_processor.backend == "pil"


@pytest.mark.parametrize("option", ["quantization", "dtype"])
def test_unknown_choices_name_the_known_ones(option: str) -> None:
    options: dict[str, Any] = {option: "2bit"}
    with pytest.raises(ValueError, match=f"^--{option}: unknown value '2bit'; known: "):
        load_qwen_vl_model_and_processor("gpt2", **options)


def test_an_unreachable_hub_id_names_the_local_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files,\nand ...")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^--model_id 'org/name' is not here and .*builtin.*HF_HOME"):
        load_qwen_vl_model_and_processor("org/name")
    monkeypatch.setattr(loading, "local_folder", Path)  # as if half of it were cached
    monkeypatch.setattr(loading.AutoModelForImageTextToText, "from_pretrained", unreachable)
    with pytest.raises(
        ValueError, match=r"^--model_id org/name is neither cached in full .*builtin.*HF_HOME"
    ):
        load_qwen_vl_model_and_processor("org/name")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "has model type 'bert', which the installed transformers does not have as"),
        ({"model_type": "newer_vl"}, "has model type 'newer_vl', which the installed transformers does not"),
        ({"model_type": "florence2"}, "florence2 is an encoder-decoder model; vlmray runs decoder-only"),
    ],
)
def test_another_kind_of_model_is_refused_before_its_weights_are_read(
    config: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_text("not to be read")
    monkeypatch.setattr("vlmray.models.loading.check_model_folder", lambda model_id: None)  # as of a hub id
    with pytest.raises(ValueError, match=message) as caught:
        load_qwen_vl_model_and_processor(str(tmp_path))
    assert str(caught.value).startswith(f"--model_id {tmp_path}")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_some_of_its_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    dropped = next(name for name in weights if name.endswith("layers.1.self_attn.q_proj.weight"))
    weights.pop(dropped)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"1 weights are not in the checkpoint .*layers\.1\.self_attn\.q_proj"
    ):
        load_qwen_vl_model_and_processor(str(broken))


def damaged(adapter: Path, folder: Path, change: Any) -> Path:
    """Copy an adapter and pass its tensors through `change`."""
    copy = Path(shutil.copytree(adapter, folder))
    weights = load_file(copy / "adapter_model.safetensors")
    save_file(change(weights), copy / "adapter_model.safetensors", metadata={"format": "pt"})
    return copy


def test_adapter_weights_that_would_have_no_effect_are_refused(
    tiny_model: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    renamed = damaged(
        tiny_adapter,
        tmp_path / "renamed",
        lambda weights: {k.replace("language_model", "text_model"): v for k, v in weights.items()},
    )
    halved = damaged(tiny_adapter, tmp_path / "halved", lambda weights: dict(list(weights.items())[::2]))
    wider = damaged(
        tiny_adapter, tmp_path / "wider", lambda weights: {k: v.repeat(2, 2) for k, v in weights.items()}
    )
    for path in (renamed, halved, wider):
        model, processor = load_qwen_vl_model_and_processor(str(tiny_model))
        with pytest.raises(ValueError, match=f"--adapter {path} does not fit the model") as caught:
            attach_adapter(model, str(path))
        assert "\n" not in str(caught.value)
    model, processor = load_qwen_vl_model_and_processor(str(tiny_model))
    engine = TransformersEngine(model, processor)
    engine.load_adapter("good", str(tiny_adapter))
    before = engine.generate([ask()])
    with pytest.raises(ValueError, match="does not fit the model"):
        engine.load_adapter("bad", str(renamed))
    assert engine.generate([ask()]) == before  # a refused adapter leaves the engine as it was
    assert not hasattr(engine.model, "peft_config")


def test_an_adapter_of_another_base_is_refused_before_loading(
    tiny_model: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    other = build_tiny_random_model(tmp_path / "other", hidden_size=64)
    with pytest.raises(ValueError, match="input width 256 in the adapter and 128 in the model"):
        load_qwen_vl_model_and_processor(str(other), adapter=str(tiny_adapter))
    engine = TransformersEngine(*load_qwen_vl_model_and_processor(str(other)))
    with pytest.raises(ValueError, match="input width 256"):
        engine.load_adapter("x", str(tiny_adapter))


def test_the_plain_path_takes_requests_and_messages_and_equals_the_engine(tiny_model: Path) -> None:
    model, processor = load_qwen_vl_model_and_processor(str(tiny_model))
    request = ask()
    text, prompt = generate_text_from_sample(model, processor, request, max_new_tokens=20)
    parts = [{"type": "image", "image": request.images[0]}, request.messages[0]["content"][1]]
    messages = [{"role": "user", "content": parts}]
    assert generate_text_from_sample(model, processor, messages, max_new_tokens=20) == (text, prompt)
    assert prompt == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        "<|image_pad|><|vision_end|>What is the value of Germany?<|im_end|>\n<|im_start|>assistant\n"
    )
    completion = TransformersEngine(model, processor).generate([request])[0]
    assert (completion.text, completion.prompt) == (text, prompt)


@needs_real_processor
@pytest.mark.parametrize("messages", MESSAGES)
def test_the_tiny_chat_template_writes_what_the_real_one_does(
    tiny_model: Path, messages: list[dict[str, Any]]
) -> None:
    real, tiny = load_processor(str(REAL_PROCESSOR)), load_processor(str(tiny_model))
    for generation in (True, False):
        expected = real.apply_chat_template(messages, add_generation_prompt=generation)
        assert tiny.apply_chat_template(messages, add_generation_prompt=generation) == expected
        by_tokenizer = tiny.tokenizer.apply_chat_template(
            messages, add_generation_prompt=generation, tokenize=False
        )
        assert by_tokenizer == expected


@needs_real_processor
def test_a_small_model_with_the_real_tokenizer_generates_in_batches(tmp_path: Path) -> None:
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    config = AutoConfig.from_pretrained(REAL_PROCESSOR)
    small_text: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    small_text["rope_parameters"] = {**config.text_config.rope_parameters, "mrope_section": [4, 6, 6]}
    small_vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
    }
    for part, changes in ((config.text_config, small_text), (config.vision_config, small_vision)):
        for name, value in {**changes, "layer_types": None, "fullatt_block_indexes": [1]}.items():
            setattr(part, name, value)
    config.text_config.layer_types = ["full_attention"] * 2
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).float().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.json"):
        shutil.copy(REAL_PROCESSOR / name, tmp_path)
    shutil.copy(REAL_PROCESSOR / "generation_config.json", tmp_path)
    model, processor = load_qwen_vl_model_and_processor(str(tmp_path), dtype="float32")
    assert model.generation_config.repetition_penalty == 1.05
    requests = [ask("How much is 12.5%?"), ask("Yes or no?", image=False), ask("你好 é")]
    completions = TransformersEngine(model, processor).generate(requests)
    for request, completion in zip(requests, completions, strict=True):
        text, prompt = generate_text_from_sample(model, processor, request, max_new_tokens=20)
        assert (completion.text, completion.prompt) == (text, prompt)


def test_patches_are_embedded_as_the_convolution_would(tiny_model: Path) -> None:
    model, processor = load_qwen_vl_model_and_processor(str(tiny_model), dtype="float32")
    embed = model.model.visual.patch_embed
    assert "forward" in vars(embed)  # replaced, and by a matrix product:
    pixels = processor.image_processor(picture(140, 112), return_tensors="pt")["pixel_values"]
    expected = type(embed).forward(embed, pixels)
    assert torch.allclose(embed(pixels), expected, atol=1e-5)
    embed.proj.__class__ = type("Adapted", (torch.nn.Conv3d,), {})  # as if an adapter were around it
    assert torch.equal(embed(pixels), expected)
