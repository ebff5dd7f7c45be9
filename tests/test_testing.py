"""The stand-ins: the tiny model is a real checkpoint, and the fake engine fails only as told."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from vlmray.schema import GenerationRequest
from vlmray.small_models import SPECIAL_TOKENS, build_tiny_random_model
from vlmray.testing import FakeEngine, build_tiny_random_adapter


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def ask(number: int = 1, color: str = "red", **options: object) -> GenerationRequest:
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    request = GenerationRequest(
        request_id=f"test-{number:06d}",
        messages=[{"role": "user", "content": parts}],
        images=[Image.new("RGB", (8, 8), color)],
    )
    return dataclasses.replace(request, **options)  # type: ignore[arg-type]


def test_the_seed_makes_the_bytes(tiny_model: Path, tmp_path: Path) -> None:
    assert hashes(build_tiny_random_model(tmp_path / "again")) == hashes(tiny_model)
    other = hashes(build_tiny_random_model(tmp_path / "other", seed=1))
    assert other["model.safetensors"] != hashes(tiny_model)["model.safetensors"]
    assert other["tokenizer.json"] == hashes(tiny_model)["tokenizer.json"]


def test_the_tiny_model_is_small_and_loads_in_plain_transformers(tiny_model: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    assert sum(path.stat().st_size for path in tiny_model.iterdir()) < 5_000_000
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    image_processor = AutoImageProcessor.from_pretrained(tiny_model)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert image_processor.size["longest_edge"] == 1280 * 28 * 28
    for token in SPECIAL_TOKENS:
        assert len(tokenizer.encode(token)) == 1
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert model.generation_config.eos_token_id == ends
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == tuple(ends)
    text = "What's 1,000 % of Ünïcode 你好?\n\n  Yes<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_other_sizes_make_another_base(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder = build_tiny_random_model(tmp_path, vocab_size=900, hidden_size=64)
    config = AutoConfig.from_pretrained(folder)
    assert (config.text_config.vocab_size, config.text_config.hidden_size) == (900, 64)
    assert len(AutoTokenizer.from_pretrained(folder)) == 900
    with pytest.raises(ValueError, match="need vocab_size >= 300"):
        build_tiny_random_model(tmp_path, vocab_size=100)


def test_the_adapter_leaves_the_vision_tower_and_the_global_seed_alone(
    tiny_model: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    weights = load_file(build_tiny_random_adapter(tmp_path, tiny_model, r=2) / "adapter_model.safetensors")
    assert torch.equal(torch.rand(3), expected)
    assert len(weights) == 2 * 7 * 2  # layers, projections, A and B
    assert all("language_model" in name and "visual" not in name for name in weights)
    assert all(weight.abs().sum() > 0 for weight in weights.values())


def test_fake_answers_tell_requests_apart() -> None:
    engine = FakeEngine.from_model_id("fake")
    requests = [
        ask(),
        ask(color="blue"),
        ask(adapter="a"),
        ask(temperature=1.0),
        ask(temperature=1.0, seed=1),
    ]
    answers = [completion.text for completion in engine.generate(requests)]
    assert len(set(answers)) == len(requests)
    assert engine.generate(requests[::-1])[::-1] == engine.generate(requests)
    assert engine.generate([ask(2)])[0].text == answers[0]  # greedy: the id does not matter
    engine.close()


def test_fake_answers_as_told() -> None:
    engine = FakeEngine.from_model_id("fake?answer=forty+two&latency_s=0.05")
    start = time.perf_counter()
    long, short = engine.generate([ask(), ask(max_new_tokens=1)])
    assert time.perf_counter() - start >= 0.1
    assert (long.text, long.finish_reason, long.num_completion_tokens) == ("forty two", "stop", 2)
    assert (short.text, short.finish_reason, short.num_completion_tokens) == ("forty", "length", 1)
    assert long.prompt == "user: <image> What is it?"


def test_fake_errors_hit_the_same_rows_whatever_the_batch(tmp_path: Path) -> None:
    log = tmp_path / "log"
    engine = FakeEngine.from_model_id(f"fake?error_every=3&log={log}")
    requests = [ask(number) for number in range(1, 8)] + [ask(9, images=[])]
    failed = [completion.finish_reason == "error" for completion in engine.generate(requests)]
    assert failed == [False, False, True, False, False, True, False, True]
    assert log.read_text().splitlines() == [request.request_id for request in requests]


def test_a_fake_crash_ends_the_process_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = (
        "from tests.test_testing import *\n"
        f"FakeEngine.from_model_id('fake?crash_on=000002&log={log}').generate([ask(1), ask(2), ask(3)])"
    )
    root = Path(__file__).parents[1]
    codes = [
        subprocess.run([sys.executable, "-c", script], cwd=root, check=False).returncode for _ in range(2)
    ]
    assert codes == [1, 0]
    assert log.read_text().split() == ["test-000001", "test-000001", "test-000002", "test-000003"]


def test_fake_loading_can_be_slow_or_fail() -> None:
    start = time.perf_counter()
    FakeEngine.from_model_id("fake?load_s=0.05")
    assert time.perf_counter() - start >= 0.05
    with pytest.raises(RuntimeError, match="told to fail on loading"):
        FakeEngine.from_model_id("fake?fail_load=1")


@pytest.mark.parametrize(
    ("model_id", "reason"),
    [
        ("tiny-random", "pass fake or fake"),
        ("fake?latency=1", "unknown parameter 'latency'.*known: answer, latency_s"),
        ("fake?latency_s=soon", "parameter 'latency_s' .* has value 'soon'"),
        ("fake?latency_s", "bad query field"),
    ],
)
def test_a_wrong_fake_id_is_refused(model_id: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        FakeEngine.from_model_id(model_id)
