"""A tower whose windows attend together sees what one sees that takes them one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vlmray.engines.transformers import attention
from vlmray.engines.transformers.attention import attend_packed, pack_attention
from vlmray.models.loading import load_qwen_vl_model_and_processor
from vlmray.models.vision import encode_images

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
GRIDS = torch.tensor([[1, 18, 26], [1, 8, 8], [1, 18, 26], [1, 4, 30]])


@pytest.mark.parametrize("onednn", [False, pytest.param(True, marks=needs_onednn)])
@pytest.mark.parametrize(
    "lengths", [[64] * 5, [7], [64, 64, 16, 64, 64, 16, 8], [3, 1, 1, 2], [200, 200, 90]]
)
def test_sequences_attend_to_themselves(
    lengths: list[int], onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "onednn_speed_up", lambda: 2.1 if onednn else 1.4)
    monkeypatch.setattr(attention, "_LEAST_PRODUCTS", 0)
    monkeypatch.setattr(attention, "_BLOCK", 60)
    packed = [torch.randn(sum(lengths), 4, 16).transpose(0, 1)[None] for _ in range(3)]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    with torch.inference_mode():
        output, _ = attend_packed(torch.nn.Identity(), *packed, scaling=0.3, cu_seq_lens_q=starts)
        alone = [
            scaled_dot_product_attention(*each, scale=0.3)
            for each in zip(*(tensor.split(lengths, dim=2) for tensor in packed), strict=True)
        ]
    torch.testing.assert_close(output, torch.cat(alone, dim=2).transpose(1, 2))


@needs_onednn
def test_only_large_ones_without_gradients_take_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    blocks = attention._attend_in_blocks
    monkeypatch.setattr(attention, "onednn_speed_up", lambda: 2.1)
    monkeypatch.setattr(
        attention, "_attend_in_blocks", lambda q, *rest: calls.append(q.shape[2]) or blocks(q, *rest)
    )
    packed = [torch.randn(1, 2, 464, 64) for _ in range(3)]
    arguments: dict[str, Any] = {"scaling": 0.1, "cu_seq_lens_q": torch.tensor([0, 400, 464])}
    attend_packed(torch.nn.Identity(), *packed, **arguments)
    with torch.inference_mode():
        attend_packed(torch.nn.Identity(), *packed, **arguments)
        attend_packed(torch.nn.Identity(), *(tensor.bfloat16() for tensor in packed), **arguments)
    assert calls == [400]


def test_a_tower_gives_the_same_in_fewer_calls(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_qwen_vl_model_and_processor(str(tiny_model))
    vision = model.config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(int(GRIDS.prod(-1).sum()), width)
    calls: list[int] = []
    monkeypatch.setattr(
        attention,
        "scaled_dot_product_attention",
        lambda q, *rest, **options: calls.append(len(q)) or scaled_dot_product_attention(q, *rest, **options),
    )
    with torch.inference_mode():
        plain = encode_images(model, pixels, GRIDS)
        assert not calls
        pack_attention(model)
        packed = encode_images(model, pixels, GRIDS)
    torch.testing.assert_close(packed, plain)
    assert len(calls) < sum(calls)  # several sequences a call


def test_another_kind_of_attention_stays(tiny_model: Path) -> None:
    model, _ = load_qwen_vl_model_and_processor(str(tiny_model), attn_implementation="eager")
    pack_attention(model)
    assert model.config.vision_config._attn_implementation == "eager"
