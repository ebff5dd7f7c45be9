"""Which modules an adapter changes, what is trained, and merging."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, BertConfig

from vlmray.models.checks import check_model_folder
from vlmray.models.families import family_of
from vlmray.models.loading import load_qwen_vl_model_and_processor
from vlmray.models.lora import (
    abbreviate_names,
    build_skeleton,
    count_parameters,
    find_lora_targets,
    freeze_vision,
    get_default_lora_config_for_qwen_vl,
)
from vlmray.models.merging import merge_adapter
from vlmray.models.processors import load_processor

# Configurations that the family's default config needs to be complete.
PADDED_LLAMA = {"pad_token_id": 0, "text_config": {"model_type": "llama", "pad_token_id": 0}}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {},
    "qwen2_vl": {},
    "qwen3_vl": {},
    "llava": {},
    "llava_next": {},
    "llava_onevision": {},
    "idefics2": {},
    "idefics3": PADDED_LLAMA,
    "smolvlm": PADDED_LLAMA,
    "paligemma": {},
    "gemma3": {},
    "internvl": {},
    "mistral3": {},
    "mllama": {},
    "glm4v": {},
    "lfm2_vl": {},
}
WITHOUT_LINEAR_MERGER = ("gemma3",)  # it keeps a bare parameter
OUTSIDE_LANGUAGE_MODEL = re.compile(r"visual|vision|merger|projector|connector|lm_head")


@functools.cache
def family(name: str) -> Any:
    """Build a family's model from its default config, without weights."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **FAMILIES[name]))


@pytest.fixture(scope="module")
def skeleton(tiny_model: Path) -> Any:
    return build_skeleton(str(tiny_model))


def targets(model: Any, **options: Any) -> list[str]:
    config = get_default_lora_config_for_qwen_vl(**options, family=family_of(model.config))
    return find_lora_targets(model, config)


def test_the_tiny_model_has_known_targets(skeleton: Any) -> None:
    assert abbreviate_names(targets(skeleton)) == [
        f"model.language_model.layers.*.{name} (2x)"
        for name in (
            *(f"self_attn.{x}_proj" for x in "qkvo"),
            *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
        )
    ]
    vision, merger = targets(skeleton, lora_vision=True), targets(skeleton, lora_merger=True)
    assert (len(vision), len(merger)) == (14 + 3 * 5, 14 + 2)
    assert [name for name in merger if "visual" in name] == [
        "model.visual.merger.mlp.0",
        "model.visual.merger.mlp.2",
    ]
    assert set(targets(skeleton, lora_vision=True, lora_merger=True)) == {*vision, *merger}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_default_is_the_language_model_and_nothing_else(name: str) -> None:
    model = family(name)
    linear = [path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert targets(model) == [path for path in linear if not OUTSIDE_LANGUAGE_MODEL.search(path)]


@pytest.mark.parametrize("name", FAMILIES)
def test_vision_and_merger_add_only_their_own_linear_layers(name: str) -> None:
    model = family(name)
    language = set(targets(model))
    vision = set(targets(model, lora_vision=True)) - language
    assert len(vision) > 20
    assert all(re.search("visual|vision", path) and "merger" not in path for path in vision)
    if name in WITHOUT_LINEAR_MERGER:
        with pytest.raises(ValueError, match=r" is a linear layer .* \(--lora_merger\); its linear layers: "):
            targets(model, lora_merger=True)
        return
    merger = set(targets(model, lora_merger=True)) - language
    assert merger
    assert not merger & vision
    assert all(re.search("merger|projector|connector", path) for path in merger)


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_vision": True, "lora_merger": True}, {"target_modules": "gate_proj, visual.merger.mlp.0"}],
)
def test_peft_adapts_exactly_these(tiny_model: Path, options: dict[str, Any]) -> None:
    config = get_default_lora_config_for_qwen_vl(r=2, **options)
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    expected = find_lora_targets(model, config)
    wrapped = get_peft_model(model, config)
    adapted = [name for name, module in wrapped.named_modules() if hasattr(module, "lora_A")]
    assert [name.removeprefix("base_model.model.") for name in adapted] == expected


def test_the_adapter_has_the_values_asked_for() -> None:
    config = get_default_lora_config_for_qwen_vl(r=3, lora_alpha=5, lora_dropout=0.25)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 5, 0.25)
    assert (config.task_type, config.bias) == ("CAUSAL_LM", "none")


def test_own_targets_are_suffixes_or_a_regex(skeleton: Any) -> None:
    suffixes = targets(skeleton, target_modules="gate_proj,q_proj")
    assert len(suffixes) == 2 + 3 + 2  # as PEFT takes them: gate_proj is in the vision tower too
    assert targets(skeleton, target_modules="layers.1.self_attn.q_proj") == [
        "model.language_model.layers.1.self_attn.q_proj"
    ]
    assert targets(skeleton, target_modules=r".*layers\.\d{1,2}\.self_attn\.[qv]_proj") == [
        f"model.language_model.layers.{layer}.self_attn.{side}_proj" for layer in (0, 1) for side in "qv"
    ]


@pytest.mark.parametrize(
    ("target_modules", "message"),
    [
        ("  ", "--lora_target_modules is empty; pass suffixes"),
        ("all-linear", "all-linear would adapt whatever is linear .*--lora_vision"),
        (".*(q_proj", "neither names with commas between them nor a regex"),
    ],
)
def test_impossible_own_targets_are_refused(target_modules: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_default_lora_config_for_qwen_vl(target_modules=target_modules)
    with pytest.raises(ValueError, match="pass one or the other"):
        get_default_lora_config_for_qwen_vl(target_modules="q_proj", lora_merger=True)


@pytest.mark.parametrize("target_modules", ["q_proj,wrong", "wrong", r".*\.wrong"])
def test_targets_that_match_nothing_are_an_error_that_lists_what_is_there(
    skeleton: Any, target_modules: str
) -> None:
    with pytest.raises(ValueError, match=r"wrong'; its linear layers: ") as caught:
        targets(skeleton, target_modules=target_modules)
    message = str(caught.value)
    assert "Qwen2_5_VLForConditionalGeneration" in message
    assert "model.language_model.layers.*.mlp.gate_proj (2x)" in message
    assert "--lora_target_modules" in message
    assert message.count("x)") == 8
    assert "lm_head" not in message


def test_a_family_with_other_names_is_an_error_and_not_half_an_adapter() -> None:
    with torch.device("meta"):
        fuyu = AutoModelForImageTextToText.from_config(AutoConfig.for_model("fuyu", num_hidden_layers=2))
    with pytest.raises(ValueError, match=r"FuyuForCausalLM .*self_attn\.query_key_value \(2x\)"):
        targets(fuyu)
    with pytest.raises(ValueError, match="no vision encoder in FuyuForCausalLM"):
        freeze_vision(fuyu)


@pytest.mark.parametrize(
    ("target_modules", "message"),
    [
        ("q_proj,lm_head", "LoRA target lm_head is the output head of .*leave it out"),
        ("act_fn", r"visual\.blocks\.0\.mlp\.act_fn of .* is a SiLUActivation, expected a linear layer"),
        ("proj", r"visual\.patch_embed\.proj of .* is a Conv3d, expected a linear layer; these are: "),
        (".*embed_tokens", "embed_tokens of .* is a Embedding, expected a linear layer"),
    ],
)
def test_targets_that_an_adapter_cannot_change_are_refused(
    skeleton: Any, target_modules: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        targets(skeleton, target_modules=target_modules)


def test_an_attention_layer_whose_projection_is_never_called_is_refused() -> None:
    with pytest.raises(ValueError, match=r"head\.attention\.out_proj .* NonDynamicallyQuantizableLinear"):
        targets(family("lfm2_vl"), target_modules="out_proj")


def test_the_skeleton_has_the_modules_of_the_loaded_model_and_no_weights(
    tiny_model: Path, skeleton: Any, hub_snapshot: Path
) -> None:
    loaded = AutoModelForImageTextToText.from_pretrained(tiny_model)
    assert [name for name, _ in skeleton.named_modules()] == [name for name, _ in loaded.named_modules()]
    assert count_parameters(skeleton) == count_parameters(loaded)
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    shutil.copy(tiny_model / "config.json", hub_snapshot)
    assert type(build_skeleton("org/name")) is type(loaded)


def test_a_model_of_another_kind_has_no_skeleton(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has model type 'bert', which .* does not have as an image-text"):
        build_skeleton(str(tmp_path))


@pytest.mark.parametrize("name", FAMILIES)
def test_freezing_vision_freezes_the_encoder_and_not_the_merger(name: str) -> None:
    model = family(name).requires_grad_(True)
    encoder = model.get_encoder(modality="image")
    within = {id(p) for path, p in encoder.named_parameters() if "merger" not in path}
    trained, total = count_parameters(model)
    assert trained == total
    frozen = freeze_vision(model)
    assert {id(p) for p in model.parameters() if not p.requires_grad} == within
    assert count_parameters(model) == (total - frozen, total)


def test_parameters_are_counted_as_peft_does(tiny_model: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = get_default_lora_config_for_qwen_vl(r=2)
    plain, _ = load_qwen_vl_model_and_processor(str(tiny_model))
    total = count_parameters(plain)[1]
    quantized, _ = load_qwen_vl_model_and_processor(str(tiny_model), quantization="4bit")
    assert count_parameters(quantized)[1] == total
    assert find_lora_targets(quantized, config) == find_lora_targets(plain, config)
    wrapped = get_peft_model(quantized, config)
    assert count_parameters(wrapped) == wrapped.get_nb_trainable_parameters()


def logits(model: Any, processor: Any) -> torch.Tensor:
    image = Image.linear_gradient("L").resize((120, 90)).convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": "What is the value of Germany?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[image], return_tensors="pt").to(model.device)
    with torch.inference_mode():
        return model(**inputs).logits.float().cpu()


@pytest.fixture(scope="module")
def merged(tiny_model: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "new" / "model"
    assert merge_adapter(str(tiny_model), str(tiny_adapter), folder) == folder
    return folder


def test_the_merged_model_equals_base_and_adapter(tiny_model: Path, tiny_adapter: Path, merged: Path) -> None:
    model, processor = load_qwen_vl_model_and_processor(str(tiny_model), adapter=str(tiny_adapter))
    expected = logits(model, processor)
    with model.disable_adapter():
        assert (logits(model, processor) - expected).abs().max() > 1
    check_model_folder(str(merged))
    torch.testing.assert_close(
        logits(*load_qwen_vl_model_and_processor(str(merged))), expected, atol=1e-4, rtol=1e-4
    )
    plain = AutoModelForImageTextToText.from_pretrained(merged).to(model.device).eval()
    assert not isinstance(plain, PeftModel)
    torch.testing.assert_close(logits(plain, processor), expected, atol=1e-4, rtol=1e-4)


def test_the_merged_folder_has_all_that_the_base_has(tiny_model: Path, merged: Path) -> None:
    assert {path.name for path in merged.iterdir()} == {path.name for path in tiny_model.iterdir()}
    assert [path.name for path in merged.parent.iterdir()] == ["model"]  # nothing half written
    for path in tiny_model.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            assert (merged / path.name).read_bytes() == path.read_bytes(), path.name
    base, new = (load_file(folder / "model.safetensors") for folder in (tiny_model, merged))
    assert {k: (v.shape, v.dtype) for k, v in new.items()} == {k: (v.shape, v.dtype) for k, v in base.items()}
    changed = {name for name in base if not torch.equal(base[name], new[name])}
    assert len(changed) == 14
    assert not any("visual" in name for name in changed)


def test_a_merged_model_keeps_the_dtype_of_its_base_and_takes_new_pixel_limits(
    tiny_model: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    half = shutil.copytree(tiny_model, tmp_path / "half")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(half / "model.safetensors").items()}
    save_file(weights, half / "model.safetensors", metadata={"format": "pt"})
    config = (half / "config.json").read_text().replace('"float32"', '"bfloat16"')
    (half / "config.json").write_text(config)
    # Contradictory, as in many a published checkpoint; save_pretrained would refuse to write it.
    generation = json.loads((half / "generation_config.json").read_text()) | {"temperature": 0.5}
    (half / "generation_config.json").write_text(json.dumps(generation))
    folder = merge_adapter(
        str(half), str(tiny_adapter), tmp_path / "out", min_pixels=9 * 784, max_pixels=16 * 784
    )
    new = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in new.values()} == {torch.bfloat16}
    assert new.keys() == weights.keys()
    assert json.loads((folder / "generation_config.json").read_text()) == generation
    size = load_processor(str(folder)).image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (9 * 784, 16 * 784)


def test_pixel_limits_reach_the_processor_file_that_is_read(
    tiny_model: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    load_processor(str(tiny_model)).save_pretrained(base)  # adds processor_config.json, which is read first
    folder = merge_adapter(str(base), str(tiny_adapter), tmp_path / "out", max_pixels=16 * 784)
    assert load_processor(str(folder)).image_processor.size["longest_edge"] == 16 * 784


def test_a_quantized_base_or_a_folder_in_use_is_refused_before_loading(
    tiny_model: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileExistsError, match=f"{tiny_model} is not an empty folder; pass a new one"):
        merge_adapter(str(tiny_model), str(tiny_adapter), tiny_model)
    base = shutil.copytree(tiny_model, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is a quantised checkpoint \(bitsandbytes\)"):
        merge_adapter(str(base), str(tiny_adapter), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_importing_is_light() -> None:
    script = (
        "import sys, vlmray.models.lora; print(*{'torch', 'transformers', 'peft', 'ray'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_config_made_elsewhere_is_looked_up_too(skeleton: Any) -> None:
    config = LoraConfig(target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    assert find_lora_targets(skeleton, config) == [
        f"model.language_model.layers.1.self_attn.{side}_proj" for side in "qv"
    ]
