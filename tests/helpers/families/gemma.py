"""The Gemma line."""

from __future__ import annotations

from helpers.families.building import HALF, TEXT, VISION, Tiny, template_of_trl

_SIGLIP = {
    **VISION, "model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14,
    "vision_use_head": False,
}  # fmt: skip
_EMBEDDING_SCALE = 0.125  # what the model multiplies by, undone
_SQUARE = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 56, "width": 56}, **HALF}


def gemma3() -> Tiny:
    return Tiny(
        config={
            "model_type": "gemma3",
            "text_config": {
                **TEXT, "model_type": "gemma3_text", "query_pre_attn_scalar": 32, "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": _SIGLIP, "mm_tokens_per_image": 4, "tie_word_embeddings": False,
            "boi_token_index": "{<start_of_image>}", "eoi_token_index": "{<end_of_image>}",
            "image_token_index": "{<image_soft_token>}",
        },
        preprocessor={
            **_SQUARE, "image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor",
        },
        processor={"processor_class": "Gemma3Processor", "image_seq_length": 4},
        template=template_of_trl("gemma3"),
        tokens=("<start_of_turn>", "<end_of_turn>"),
        named={
            "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        embedding_scale=_EMBEDDING_SCALE, bos="<bos>", eos="<eos>", pad="<pad>", ends=("<end_of_turn>",),
    )  # fmt: skip


def gemma4() -> Tiny:
    return Tiny(
        config={
            "model_type": "gemma4",
            "text_config": {
                **TEXT, "model_type": "gemma4_text", "sliding_window": 16, "global_head_dim": 32,
                "layer_types": ["sliding_attention", "full_attention"], "vocab_size_per_layer_input": 400,
                "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0,
            },
            "vision_config": {
                **VISION, "model_type": "gemma4_vision", "patch_size": 8, "head_dim": 16,
                "num_key_value_heads": 2, "position_embedding_size": 64, "pooling_kernel_size": 2,
                "default_output_length": 9,
            },
            "audio_config": None, "tie_word_embeddings": False, "image_token_id": "{<|image|>}",
            "boi_token_id": "{<|image>}", "eoi_token_id": "{<image|>}", "video_token_id": "{<|video|>}",
            "audio_token_id": "{<|audio|>}",
        },
        preprocessor={
            "image_processor_type": "Gemma4ImageProcessor", "processor_class": "Gemma4Processor",
            "patch_size": 8, "pooling_kernel_size": 2, "max_soft_tokens": 70,
        },
        processor={"processor_class": "Gemma4Processor", "image_seq_length": 9},
        template=template_of_trl("gemma4"),
        tokens=("<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>"),
        named={
            "boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>",
            "video_token": "<|video|>", "audio_token": "<|audio|>", "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
        },
        embedding_scale=_EMBEDDING_SCALE, bos="<bos>", eos="<eos>", pad="<pad>", ends=("<turn|>",),
    )  # fmt: skip


def paligemma() -> Tiny:
    return Tiny(
        config={
            "model_type": "paligemma", "text_config": {**TEXT, "model_type": "gemma"},
            "vision_config": {**_SIGLIP, "projection_dim": 64}, "projection_dim": 64,
            "image_token_index": "{<image>}", "tie_word_embeddings": False,
        },
        preprocessor={**_SQUARE, "processor_class": "PaliGemmaProcessor", "image_seq_length": 16},
        template=None, tokens=(), named={"image_token": "<image>"},
        embedding_scale=_EMBEDDING_SCALE, bos="<bos>", eos="<eos>", pad="<pad>",
    )  # fmt: skip


TINY = {each.__name__: each for each in (gemma3, gemma4, paligemma)}
