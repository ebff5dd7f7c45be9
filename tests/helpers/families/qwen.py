"""Models whose images are patches and whose positions have three axes: Qwen-VL and GLM-V."""

from __future__ import annotations

from typing import Any

from helpers.families.building import CHATML, TEXT, Tiny, chat, template_of_trl

_TOKENS = (*CHATML, "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_IDS = {
    "image_token_id": "{<|image_pad|>}",
    "video_token_id": "{<|video_pad|>}",
    "vision_start_token_id": "{<|vision_start|>}",
    "vision_end_token_id": "{<|vision_end|>}",
}
_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
_DEEPSTACK = {"deepstack_visual_indexes": [0], "num_position_embeddings": 64, "patch_size": 16}
_EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip


def _qwen(
    model_type: str, template: str, processor: str, vision: dict[str, Any], rope: dict[str, Any], **text: Any
) -> Tiny:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6], **rope}
    return Tiny(
        config={
            "model_type": model_type,
            "text_config": {**TEXT, "rope_parameters": rope, **text},
            "vision_config": {**_TOWER, **vision},
            "tie_word_embeddings": False,
            **_IDS,
        },
        preprocessor={
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": processor,
            "size": {"shortest_edge": 2000, "longest_edge": 9000},
            "patch_size": vision.get("patch_size", 14),
            "merge_size": 2,
        },
        template=template_of_trl(template),
        tokens=_TOKENS,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        ends=("<|endoftext|>",),
    )


def qwen2_vl(**text: Any) -> Tiny:
    tower = {"embed_dim": 32, "hidden_size": 64}  # here the width of the language model
    return _qwen("qwen2_vl", "qwen2_5_vl", "Qwen2VLProcessor", tower, {}, **text)


def qwen2_5_vl() -> Tiny:
    tower = {"fullatt_block_indexes": [1], "window_size": 56}
    return _qwen("qwen2_5_vl", "qwen2_5_vl", "Qwen2_5_VLProcessor", tower, {})


def qwen3_vl() -> Tiny:
    rope = {"mrope_interleaved": True, "mrope_section": [6, 5, 5]}
    return _qwen("qwen3_vl", "qwen3_vl", "Qwen3VLProcessor", _DEEPSTACK, rope)


def qwen3_vl_moe() -> Tiny:
    rope = {"mrope_interleaved": True, "mrope_section": [6, 5, 5]}
    return _qwen("qwen3_vl_moe", "qwen3_vl", "Qwen3VLProcessor", _DEEPSTACK, rope, **_EXPERTS)


def qwen3_5(model_type: str = "qwen3_5", **text: Any) -> Tiny:
    rope = {"mrope_interleaved": True, "mrope_section": [3, 3, 2], "partial_rotary_factor": 0.5}
    linear = {
        "num_hidden_layers": 3, "linear_num_key_heads": 2,
        "layer_types": ["full_attention", "linear_attention", "full_attention"],
        "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    }  # fmt: skip
    tower = {"num_position_embeddings": 64, "patch_size": 16}
    return _qwen(model_type, "qwen3_5_think", "Qwen3VLProcessor", tower, rope, **linear, **text)


def qwen3_5_moe() -> Tiny:
    return qwen3_5("qwen3_5_moe", **_EXPERTS, shared_expert_intermediate_size=32)


_GLM_TEMPLATE = chat(
    "<|user|>\n{}", "<|assistant|>\n{}", head="[gMASK]<sop>",
    image="<|begin_of_image|><|image|><|end_of_image|>", prompt="<|assistant|>\n",
)  # fmt: skip


def _glm(model_type: str, processor: str, **text: Any) -> Tiny:
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [2, 3, 3],
        "partial_rotary_factor": 0.5,
    }
    return Tiny(
        config={
            "model_type": model_type,
            "text_config": {**TEXT, "rope_parameters": rope, **text},
            "vision_config": {
                **_TOWER, "out_hidden_size": 64, "intermediate_size": 64, "image_size": 56, "num_heads": 2
            },
            "tie_word_embeddings": False,
            "image_token_id": "{<|image|>}",
            "video_token_id": "{<|video|>}",
            "image_start_token_id": "{<|begin_of_image|>}",
            "image_end_token_id": "{<|end_of_image|>}",
            "video_start_token_id": "{<|begin_of_video|>}",
            "video_end_token_id": "{<|end_of_video|>}",
        },
        preprocessor={
            "image_processor_type": processor.replace("Processor", "ImageProcessor"),
            "processor_class": processor,
            "size": {"shortest_edge": 4000, "longest_edge": 18000},
            "patch_size": 14,
            "merge_size": 2,
        },
        template=_GLM_TEMPLATE,
        tokens=(
            "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|image|>", "<|video|>",
            *(f"<|{side}_of_{what}|>" for side in ("begin", "end") for what in ("image", "video")),
        ),
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        ends=("<|user|>",),
    )  # fmt: skip


def glm4v() -> Tiny:
    return _glm("glm4v", "Glm4vProcessor")


def glm4v_moe() -> Tiny:
    return _glm("glm4v_moe", "Glm4vProcessor", **_EXPERTS, n_shared_experts=1)


def glm46v() -> Tiny:
    return _glm("glm46v", "Glm46VProcessor")


TINY = {
    each.__name__: each
    for each in (
        qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe, qwen3_5, qwen3_5_moe, glm4v, glm4v_moe, glm46v,
    )
}  # fmt: skip
