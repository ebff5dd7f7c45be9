"""Models with a tower and a projector: LLaVA, Idefics3, InternVL, Pixtral and their like."""

from __future__ import annotations

from typing import Any

from helpers.families.building import CHATML, HALF, TEXT, VISION, Tiny, chat, chatml, template_of_trl

_CLIP = {**VISION, "model_type": "clip_vision_model", "image_size": 56, "patch_size": 14}
_SIGLIP = {**_CLIP, "model_type": "siglip_vision_model"}
_LLAMA = {**TEXT, "model_type": "llama"}
_TILES = [[56, 112], [112, 56], [112, 112]]


def llava() -> Tiny:
    return Tiny(
        config={
            "model_type": "llava", "text_config": _LLAMA, "vision_config": _CLIP,
            "tie_word_embeddings": False,
            "image_token_index": "{<image>}", "vision_feature_layer": -1,
        },
        preprocessor={
            "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor",
            "size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56},
        },
        processor={
            "processor_class": "LlavaProcessor", "patch_size": 14, "image_token": "<image>",
            "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
        },
        template=chat("USER: {} ", "ASSISTANT: {} ", image="<image>\n", prompt="ASSISTANT:"),
        tokens=("<image>",), bos="<s>", eos="</s>", pad="<pad>",
    )  # fmt: skip


def llava_next() -> Tiny:
    return Tiny(
        config={
            "model_type": "llava_next", "text_config": _LLAMA, "vision_config": _CLIP,
            "tie_word_embeddings": False, "image_token_index": "{<image>}", "image_grid_pinpoints": _TILES,
            "vision_feature_layer": -1,
        },
        preprocessor={
            "image_processor_type": "LlavaNextImageProcessor", "processor_class": "LlavaNextProcessor",
            "size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56},
            "image_grid_pinpoints": _TILES,
        },
        processor={
            "processor_class": "LlavaNextProcessor", "patch_size": 14, "image_token": "<image>",
            "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
        },
        template=template_of_trl("llava_next"), tokens=("<image>",), bos="<s>", eos="</s>", pad="<pad>",
    )  # fmt: skip


def llava_onevision() -> Tiny:
    return Tiny(
        config={
            "model_type": "llava_onevision", "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": {**_SIGLIP, "vision_use_head": False}, "tie_word_embeddings": False,
            "image_token_index": "{<image>}", "video_token_index": "{<video>}",
            "image_grid_pinpoints": _TILES, "vision_aspect_ratio": "anyres_max_9",
        },
        preprocessor={
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "processor_class": "LlavaOnevisionProcessor",
            "size": {"height": 56, "width": 56}, "image_grid_pinpoints": _TILES, **HALF,
        },
        processor={
            "processor_class": "LlavaOnevisionProcessor", "num_image_tokens": 16,
            "vision_feature_select_strategy": "full", "image_token": "<image>", "video_token": "<video>",
            "vision_aspect_ratio": "anyres_max_9",
        },
        template=chat(
            "<|im_start|>user {}<|im_end|>", "<|im_start|>assistant \n{}<|im_end|>",
            image="<image>\n", prompt="<|im_start|>assistant\n",
        ),
        tokens=(*CHATML, "<image>", "<video>"), eos="<|im_end|>", pad="<|endoftext|>",
    )  # fmt: skip


def internvl() -> Tiny:
    return Tiny(
        config={
            "model_type": "internvl", "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": {
                **VISION, "model_type": "internvl_vision", "image_size": [56, 56], "patch_size": [14, 14]
            },
            "tie_word_embeddings": False, "image_token_id": "{<IMG_CONTEXT>}", "image_seq_length": 4,
        },
        preprocessor={
            "image_processor_type": "GotOcr2ImageProcessor", "processor_class": "InternVLProcessor",
            "size": {"height": 56, "width": 56}, "crop_to_patches": True, "max_patches": 4,
        },
        processor={"processor_class": "InternVLProcessor", "image_seq_length": 4},
        template=chatml(image="<IMG_CONTEXT>\n"),
        tokens=CHATML,
        named={
            "start_image_token": "<img>", "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
        },
        eos="<|im_end|>", pad="<|endoftext|>",
    )  # fmt: skip


def _idefics(model_type: str, name: str, **processor: Any) -> Tiny:
    bos = {"idefics3": "<|begin_of_text|>"}.get(model_type)
    return Tiny(
        config={
            "model_type": model_type, "text_config": {**_LLAMA, "pad_token_id": 0},
            "vision_config": {**_SIGLIP, "model_type": f"{model_type}_vision"},
            "tie_word_embeddings": False, "image_token_id": "{<image>}", "scale_factor": 2, "pad_token_id": 0,
        },
        preprocessor={
            "image_processor_type": f"{name}ImageProcessor", "processor_class": f"{name}Processor",
            "size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}, **HALF,
        },
        processor={"processor_class": f"{name}Processor", "image_seq_len": 4, **processor},
        template=template_of_trl(model_type),
        tokens=(
            "<image>", "<fake_token_around_image>", "<global-img>", "<|im_start|>",
            *(f"<row_{row}_col_{col}>" for row in range(1, 4) for col in range(1, 4)),
        ),
        bos=bos, eos="<end_of_utterance>", pad="<pad>",
    )  # fmt: skip


def idefics3() -> Tiny:
    return _idefics("idefics3", "Idefics3")


def smolvlm() -> Tiny:
    return _idefics("smolvlm", "SmolVLM")


_PIXTRAL = {**VISION, "model_type": "pixtral", "image_size": 112, "patch_size": 14, "head_dim": 16}
_PIXTRAL_FILES: dict[str, Any] = {
    "template": chat("[INST]{}[/INST]", "{}</s>", head="<s>", image="[IMG]", prompt=""),
    "tokens": ("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"),
    "bos": "<s>", "eos": "</s>", "pad": "<pad>",
}  # fmt: skip


def _pixtral_files(patch_size: int, merge_size: int) -> dict[str, Any]:
    names = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    return {
        "preprocessor": {
            "image_processor_type": "PixtralImageProcessor", "processor_class": "PixtralProcessor",
            "size": {"longest_edge": 112}, "patch_size": {"height": patch_size, "width": patch_size},
        },
        "processor": {
            "processor_class": "PixtralProcessor", "patch_size": patch_size,
            "spatial_merge_size": merge_size, **names,
        },
        **_PIXTRAL_FILES,
    }  # fmt: skip


def pixtral() -> Tiny:
    return Tiny(
        config={
            "model_type": "llava", "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None},
            "vision_config": _PIXTRAL, "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
            "tie_word_embeddings": False, "image_token_index": "{[IMG]}",
        },
        **_pixtral_files(14, 1),
    )  # fmt: skip


def mistral3(sliding_window: int | None = None) -> Tiny:
    text = {**TEXT, "model_type": "mistral", "sliding_window": sliding_window}
    return Tiny(
        config={
            "model_type": "mistral3", "text_config": text, "vision_config": _PIXTRAL,
            "vision_feature_layer": -1, "spatial_merge_size": 2, "tie_word_embeddings": False,
            "image_token_index": "{[IMG]}",
        },
        **_pixtral_files(14, 2),
    )  # fmt: skip


TINY = {
    each.__name__: each
    for each in (llava, llava_next, llava_onevision, internvl, idefics3, smolvlm, mistral3, pixtral)
}
