"""Linear layers in oneDNN's kernels give what torch's own give."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from vlmray.engines.transformers import linear
from vlmray.engines.transformers.linear import OneDnnLinear, onednn_speed_up, use_faster_kernels

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take any processor for one on which oneDNN is faster."""
    monkeypatch.setattr(linear, "onednn_speed_up", lambda: 1.4)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 192), (600, 192), (3, 217, 192), (2, 5, 70, 192), (0, 192)])
def test_it_is_the_same_layer(shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_LEAST_PRODUCTS", 0)
    plain = nn.Linear(192, 320, bias=bias)
    fast = copy.deepcopy(plain)
    use_faster_kernels(fast)
    assert isinstance(fast, OneDnnLinear)
    inputs = torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(fast(inputs), plain(inputs))
        turned = torch.randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)  # not contiguous
        torch.testing.assert_close(fast(turned), plain(turned))


@needs_onednn
def test_large_ones_take_oneDNN_and_small_or_trained_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(linear, "multiply", lambda *args: calls.append(len(args[0])) or torch.empty(0))
    layer = nn.Linear(256, 256)
    use_faster_kernels(layer)
    with torch.inference_mode():
        layer(torch.randn(64, 256))
        layer(torch.randn(8, 256))
    layer(torch.randn(32, 256)).sum().backward()
    assert calls == [64]
    assert layer.weight.grad is not None


def test_layers_of_another_kind_stay_as_they_are() -> None:
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict(
        {"plain": nn.Linear(4, 4), "own": Own(4, 4), "halved": nn.Linear(4, 4, dtype=torch.bfloat16)}
    )
    use_faster_kernels(model)
    assert [type(layer) for layer in model.values()] == [OneDnnLinear, Own, nn.Linear]


@needs_onednn
@pytest.mark.parametrize(
    ("described", "expected"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\n", 2.1),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n", 1.4),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\n", 1.0),
        ("", 1.0),
    ],
)
def test_makers_and_generations_are_told_apart(
    described: str, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self, **_: described)
    assert onednn_speed_up.__wrapped__() == expected
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert onednn_speed_up.__wrapped__() == 1
