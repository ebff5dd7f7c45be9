"""The stand-ins: the tiny model is a real checkpoint, and the fake engine fails only as told."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from helpers.paths import ROOT
from vlmray.engines.fake import FakeEngine, build_tiny_random_adapter
from vlmray.schema import GenerationRequest


def ask(number: int = 1, color: str = "red", **options: object) -> GenerationRequest:
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    request = GenerationRequest(
        request_id=f"test-{number:06d}",
        messages=[{"role": "user", "content": parts}],
        images=[Image.new("RGB", (8, 8), color)],
    )
    return dataclasses.replace(request, **options)  # type: ignore[arg-type]


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


def test_the_fake_engine_writes_word_by_word_while_it_is_wanted(tmp_path: Path) -> None:
    log, token_log = tmp_path / "log", tmp_path / "tokens"
    model_id = f"fake?answer=forty+two+or+so&token_s=0.01&log={log}&token_log={token_log}"
    pieces: list[str] = []
    start = time.perf_counter()
    cut, unread, whole = FakeEngine.from_model_id(model_id).generate(
        [ask(number) for number in (1, 2, 3)],
        on_text=lambda index, text: pieces.append(f"{index}{text}"),
        cancelled=lambda index: index == 1 or (index == 0 and len(pieces) == 2),
    )
    assert time.perf_counter() - start >= 6 * 0.01
    assert pieces == ["0forty", "0 two", "2forty", "2 two", "2 or", "2 so"]
    assert [(c.text, c.finish_reason) for c in (cut, unread, whole)] == [
        ("forty two", "cancelled"), ("", "cancelled"), ("forty two or so", "stop")
    ]  # fmt: skip
    assert [c.num_completion_tokens for c in (cut, unread, whole)] == [2, 0, 4]
    assert token_log.read_text().split() == ["forty", "two", "forty", "two", "or", "so"]
    assert log.read_text().split() == ["test-000001", "test-000003"]


def test_fake_errors_hit_the_same_rows_whatever_the_batch(tmp_path: Path) -> None:
    log = tmp_path / "log"
    engine = FakeEngine.from_model_id(f"fake?error_every=3&log={log}")
    requests = [ask(number) for number in range(1, 8)] + [ask(9, images=[])]
    failed = [completion.finish_reason == "error" for completion in engine.generate(requests)]
    assert failed == [False, False, True, False, False, True, False, True]
    assert log.read_text().splitlines() == [request.request_id for request in requests]


@pytest.mark.parametrize(("every_time", "expected"), [(0, [1, 0]), (1, [1, 1])])
def test_a_fake_crash_ends_the_process_once_or_each_time(
    every_time: int, expected: list[int], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    model_id = f"fake?crash_on=000009|000002&crash_every_time={every_time}&log={log}"
    script = (
        "import sys; sys.path += ['tests', 'tests/engines']\nfrom test_fake import *\n"
        f"FakeEngine.from_model_id({model_id!r}).generate([ask(1), ask(2), ask(3)])"
    )
    codes = [
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode for _ in range(2)
    ]
    assert codes == expected
    again = [] if every_time else ["test-000002", "test-000003"]
    assert log.read_text().split() == ["test-000001", "test-000001", *again]


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
