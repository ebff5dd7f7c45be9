"""Models that are each of a kind: Llama 3.2 Vision, Aya Vision, LFM2-VL."""

from __future__ import annotations

from helpers.families.building import CHATML, HALF, TEXT, VISION, Tiny, chat, chatml


def mllama() -> Tiny:
    turn = "<|start_header_id|>{}<|end_header_id|>\n\n"
    return Tiny(
        config={
            "model_type": "mllama",
            "text_config": {
                **TEXT, "model_type": "mllama_text_model", "num_hidden_layers": 3,
                "cross_attention_layers": [1],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "vision_config": {
                "model_type": "mllama_vision_model", "hidden_size": 32, "intermediate_size": 48,
                "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2, "image_size": 56,
                "patch_size": 14, "vision_output_dim": 64, "intermediate_layers_indices": [0],
                "max_num_tiles": 4,
                "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
            },
            "image_token_index": "{<|image|>}", "tie_word_embeddings": False,
        },
        preprocessor={
            "image_processor_type": "MllamaImageProcessor", "processor_class": "MllamaProcessor",
            "size": {"height": 56, "width": 56}, "max_image_tiles": 4, **HALF,
        },
        template=chat(
            turn.format("user") + "{}<|eot_id|>", turn.format("assistant") + "{}<|eot_id|>",
            head="<|begin_of_text|>", image="<|image|>", prompt=turn.format("assistant"),
        ),
        tokens=("<|start_header_id|>", "<|end_header_id|>", "<|image|>", "<|python_tag|>"),
        bos="<|begin_of_text|>", eos="<|eot_id|>", pad="<|finetune_right_pad_id|>",
    )  # fmt: skip


def aya_vision() -> Tiny:
    turn = "<|START_OF_TURN_TOKEN|>"
    return Tiny(
        config={
            "model_type": "aya_vision",
            "text_config": {
                **TEXT, "model_type": "cohere2", "sliding_window": 16, "logit_scale": 1.0,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": {
                **VISION, "model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14,
                "vision_use_head": False,
            },
            "image_token_index": "{<|IMG_PATCH|>}", "tie_word_embeddings": False, "downsample_factor": 2,
            "adapter_layer_norm_eps": 1e-6, "alignment_intermediate_size": 64,
        },
        preprocessor={
            "image_processor_type": "GotOcr2ImageProcessor", "processor_class": "AyaVisionProcessor",
            "size": {"height": 56, "width": 56}, "crop_to_patches": True, "max_patches": 4, **HALF,
        },
        processor={
            "processor_class": "AyaVisionProcessor", "patch_size": 14, "img_size": 56, "downsample_factor": 2,
        },
        template=chat(
            f"{turn}<|USER_TOKEN|>{{}}<|END_OF_TURN_TOKEN|>",
            f"{turn}<|CHATBOT_TOKEN|><|START_RESPONSE|>{{}}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
            head="<BOS_TOKEN>", image="<image>", prompt=f"{turn}<|CHATBOT_TOKEN|><|START_RESPONSE|>",
        ),
        tokens=(
            turn, "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<image>",
            "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>",
            "TILE", "TILE_GLOBAL",
        ),
        bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>", pad="<PAD>",
    )  # fmt: skip


def lfm2_vl() -> Tiny:
    return Tiny(
        config={
            "model_type": "lfm2_vl",
            "text_config": {
                **TEXT, "model_type": "lfm2", "num_hidden_layers": 3, "conv_L_cache": 3,
                "layer_types": ["full_attention", "conv", "full_attention"],
                "block_ff_dim": 96, "block_auto_adjust_ff_dim": False,
            },
            "vision_config": {
                **VISION, "model_type": "siglip2_vision_model", "patch_size": 8, "num_patches": 64,
                "vision_use_head": False,
            },
            "image_token_id": "{<image>}", "tie_word_embeddings": False, "projector_hidden_size": 64,
        },
        preprocessor={
            "image_processor_type": "Lfm2VlImageProcessor", "processor_class": "Lfm2VlProcessor",
            "encoder_patch_size": 8, "tile_size": 64, "min_image_tokens": 4, "max_image_tokens": 16,
            "max_num_patches": 64, "do_image_splitting": False, **HALF,
        },
        processor={"processor_class": "Lfm2VlProcessor"},
        template="{{ bos_token }}" + chatml(image="<image>"),
        tokens=(*CHATML, "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"),
        named={"image_token": "<image>"},
        embedding_scale=0.3, bos="<|startoftext|>", eos="<|im_end|>", pad="<|pad|>",
    )  # fmt: skip


TINY = {each.__name__: each for each in (mllama, aya_vision, lfm2_vl)}
