"""Chat templates and their variables: given as options, heard everywhere, kept with an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText

from vlmray.config import FinetuneConfig, InferConfig, LoadingConfig
from vlmray.config.parsing import parse_args
from vlmray.dataset.prompts import format_qwen_vl_messages
from vlmray.engines.transformers.engine import TransformersEngine
from vlmray.engines.vllm.requests import AsyncRow, Opener
from vlmray.errors import OptionError
from vlmray.finetune.artifacts import _write_template
from vlmray.models.processors import load_processor
from vlmray.models.source import ModelSource
from vlmray.models.templates.chat import (
    AdapterTemplates,
    check_template,
    set_variables,
    template_fingerprint,
    use_template,
    with_template,
)
from vlmray.schema import GenerationRequest

OTHER = (
    "\n{% if enable_thinking %}T{% else %}N{% endif %}{{ mood }}:"
    "{% for message in messages %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endfor %}"
)
MESSAGES = format_qwen_vl_messages("Why?", 0)


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    return load_processor(str(tiny_model))


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "other.jinja"
    path.write_text(OTHER, encoding="utf-8")
    return path


def _render(template: str, processor: Any, **variables: Any) -> str:
    return str(processor.apply_chat_template(MESSAGES, chat_template=template, **variables))


def test_variables_are_set_unless_the_call_says_otherwise(processor: Any) -> None:
    for value in (False, True, None, 3, 0.5, 'it\'s "é" 🙂\n{{x}}', ["a", 1], {"a": {"b": None}}):
        given = _render(OTHER, processor, mood=value, enable_thinking=True)
        found = set_variables(OTHER, {"mood": value, "enable_thinking": True})
        assert _render(found, processor) == given
        assert _render(found, processor, enable_thinking=False) == given.replace("T", "N", 1)
    assert set_variables(OTHER, {}) == OTHER


@pytest.mark.parametrize("name", ["messages", "eos_token", "enable_thinkin", "tools"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(OptionError) as error_info:
        set_variables(OTHER, {name: 1})
    assert str(error_info.value) == (
        f"--chat_template_kwargs: {name!r} is no variable of the chat template; it has enable_thinking, mood"
    )


def test_a_template_is_checked_before_anything_starts(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "broken").write_text("{% if %}")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for name, message in (
        ("gone", "--chat_template .*gone: No such file"),
        ("broken", "--chat_template is no Jinja: line 1"),
        ("bytes", "--chat_template .*bytes: it is not UTF-8"),
    ):
        with pytest.raises(OptionError, match=message):
            check_template(LoadingConfig(chat_template=str(tmp_path / name)), tiny_model)
    with pytest.raises(OptionError, match="'thinking' is no variable of the chat template; it has"):
        check_template(LoadingConfig(chat_template_kwargs={"thinking": 1}), tiny_model)
    check_template(LoadingConfig(), None)
    check_template(
        LoadingConfig(chat_template_kwargs={"thinking": 1}), None
    )  # it is looked at where it loads


def test_workers_get_the_template_itself(template: Path, processor: Any, tiny_model: Path) -> None:
    config = LoadingConfig(chat_template=str(template), chat_template_kwargs={"mood": "calm"})
    sent = with_template(config)
    assert sent.chat_template == OTHER
    assert with_template(sent) == sent
    assert template_fingerprint(sent) == template_fingerprint(config) != {}
    other = load_processor(str(tiny_model))
    use_template(other, sent)
    assert other.apply_chat_template(MESSAGES) == "\nNcalm:Why?"


def test_kwargs_of_a_yaml_file_are_what_json_would_make_of_them(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("chat_template_kwargs: {enable_thinking: false, n: 3, mood: calm, none: null}\n")
    common = ["--sample_slices", "[:]"]
    found = parse_args(InferConfig, ["--config", str(path), *common]).chat_template_kwargs
    assert found == {"enable_thinking": False, "n": 3, "mood": "calm", "none": None}
    line = ["--chat_template_kwargs", '{"enable_thinking": false}', *common]
    assert parse_args(InferConfig, line).chat_template_kwargs == {"enable_thinking": False}


def test_an_adapter_keeps_the_template_it_was_trained_with(
    template: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = FinetuneConfig(chat_template=str(template), chat_template_kwargs={"mood": "calm"})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    assert dict(AdapterTemplates()) == {}
    _write_template(config, ModelSource.find(str(tiny_model)), adapter)
    options = {"chat_template": OTHER, "chat_template_kwargs": {"mood": "calm"}}
    (adapter / "training.json").write_text(json.dumps({"options": options}))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "training.json").write_text(json.dumps({"options": {"chat_template": None}}))
    for given, expected in (
        (LoadingConfig(), "\nNcalm:Why?"),
        (LoadingConfig(chat_template="{{ 'x' }}"), "x"),
    ):
        templates = AdapterTemplates(given)
        templates.add("calm", str(adapter))
        templates.add("plain", str(tmp_path / "plain"))
        assert "plain" not in templates
        processor = load_processor(str(tiny_model))
        use_template(processor, given)
        model = AutoModelForImageTextToText.from_pretrained(tiny_model).eval()
        engine = TransformersEngine(model, processor, templates=templates)
        engine._adapters["calm"] = None  # its weights do not matter here
        engine._adapters["plain"] = None
        requests = [
            GenerationRequest(request_id=str(name), messages=MESSAGES, adapter=name, max_new_tokens=1)
            for name in ("calm", "plain", None)
        ]
        calm, plain, base = (completion.prompt for completion in engine.generate(requests))
        engine.close()
        assert (calm, plain) == (expected, base)


def test_prompts_for_vllm_follow_the_adapter(processor: Any) -> None:
    opener = Opener(processor, {"calm": set_variables(OTHER, {"mood": "calm"})})
    prompts = []
    for name in ("calm", None):
        request = GenerationRequest(request_id="x", messages=MESSAGES, adapter=name)
        row = AsyncRow(0, request)
        opener.open(row, None)
        prompts.append(row.prompt)
    assert prompts == ["\nNcalm:Why?", processor.apply_chat_template(MESSAGES, add_generation_prompt=True)]
