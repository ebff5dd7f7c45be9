"""Models that are built from a seed: the same everywhere, complete, and known by name."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlmray.builtin.charts import ChartDataset, parse_charts_name
from vlmray.builtin.random_models import SPECIAL_TOKENS, build_tiny_random_model, build_untrained_model
from vlmray.models.source import is_built_in, resolve_model_id


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


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


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_untrained_model(tmp_path_factory.mktemp("models") / "untrained")


def test_the_untrained_model_is_the_same_each_time(untrained: Path, tmp_path: Path) -> None:
    assert hashes(build_untrained_model(tmp_path / "again")) == hashes(untrained)
    other = hashes(build_untrained_model(tmp_path / "other", seed=1))
    assert other["model.safetensors"] != hashes(untrained)["model.safetensors"]


def test_words_of_the_charts_are_single_tokens(untrained: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(untrained)
    charts = ChartDataset(parse_charts_name("charts?num_rows=300&seed=11"), "test")
    for row in map(charts.ask, range(300)):
        for text in (row["question"], *row["answers"]):
            words = text.replace("?", " ?").replace(".", " .").replace(",", " ,").split()
            digits = sum(len(word) - 1 for word in words if word.isdigit())
            spaces_before_numbers = sum(word.isdigit() for word in words[1:])
            assert len(tokenizer.encode(text)) == len(words) + digits + spaces_before_numbers, text
    text = "What's 1,000 % of Ünïcode 你好?\n\n  Yes<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_it_starts_from_chance_and_in_scale(untrained: Path) -> None:
    """Before training every token is about as likely, whatever the prompt."""
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(untrained, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(input_ids=torch.arange(300)[None]).logits[0]
    assert 0.5 < float(logits.std()) < 2


def test_names_of_built_in_models() -> None:
    assert all(map(is_built_in, ("builtin", "builtin-untrained", "tiny-random")))
    assert not any(map(is_built_in, ("", "Builtin", "Qwen/Qwen2.5-VL-7B", "./builtin")))


def test_tiny_random_is_built_once_and_the_same_by_processes_that_race(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "from vlmray.models.source import resolve_model_id; print(resolve_model_id('tiny-random'))"
    monkeypatch.setenv("VLMRAY_CACHE", str(tmp_path))
    started = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    folders = {process.communicate()[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0]
    assert folders == {resolve_model_id("tiny-random")}
    assert [str(path) for path in tmp_path.iterdir()] == [*folders]  # no scratch folder is left
    for path in Path(folders.pop()).iterdir():
        assert path.read_bytes() == (tiny_model / path.name).read_bytes()
    assert resolve_model_id("Qwen/Qwen2.5-VL-7B") == "Qwen/Qwen2.5-VL-7B"
