"""Forms of answers: every answer keeps its own, whatever its neighbours are asked for."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import jsonschema
import pytest
import torch
from llguidance import LLMatcher, LLTokenizer

from helpers.engines import CHOICES, JSON, REGEX, make_formed_requests, make_request, texts
from helpers.families import TINY
from helpers.families.loading import load_tiny
from vlmray.engines.forms import to_grammar
from vlmray.engines.rows import end_ids
from vlmray.engines.transformers.grammars import Grammars, allow
from vlmray.schema import Form


def check(form: Form, text: str) -> None:
    if form.schema is not None:
        jsonschema.validate(json.loads(text), json.loads(form.schema))
    elif form.regex is not None:
        assert re.fullmatch(form.regex, text)
    else:
        assert text in form.choices


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_answers_keep_their_form(make_engine: Any, temperature: float) -> None:
    requests = make_formed_requests(temperature=temperature, max_new_tokens=200)
    completions = make_engine().generate(requests)
    for request, completion in zip(requests, completions, strict=True):
        if request.form is not None:
            assert completion.finish_reason == "stop"
            check(request.form, completion.text)


def test_neighbours_with_other_forms_or_none_do_not_matter(make_engine: Any) -> None:
    requests = make_formed_requests(max_new_tokens=40)
    plain = [dataclasses.replace(request, form=None) for request in requests]
    free = texts(make_engine(batch_size=1).generate(plain))
    alone = texts(make_engine(batch_size=1).generate(requests))
    for request, text, unbound in zip(requests, alone, free, strict=True):
        assert (text == unbound) == (request.form is None)
    for batch_size in (4, 20):
        assert texts(make_engine(batch_size=batch_size).generate(requests)) == alone


def test_an_answer_that_is_cut_says_so(make_engine: Any) -> None:
    (completion,) = make_engine().generate([make_request(0, form=JSON, max_new_tokens=3)])
    assert (completion.finish_reason, completion.num_completion_tokens) == ("length", 3)
    with pytest.raises(json.JSONDecodeError):
        json.loads(completion.text)


def test_a_form_is_compiled_once(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Form] = []
    compile_anew = Grammars._compile_anew

    def count(self: Grammars, form: Form) -> Any:
        compiled.append(form)
        return compile_anew(self, form)

    monkeypatch.setattr(Grammars, "_compile_anew", count)
    engine = make_engine(batch_size=2)
    engine.generate(make_formed_requests())
    engine.generate(make_formed_requests())
    assert len(compiled) == len(set(compiled)) == 3


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"form": Form(schema='{"type": "strin"}')}, "cannot be compiled: Invalid type: strin"),
        ({"form": Form(regex="(")}, "unclosed group"),
        ({"form": Form(schema='{"items": {"type": "array", "minItems": 1e9}}')}, "1,000,000,000 places"),
        ({"form": Form(schema='{"items": ' * 700 + "{}" + "}" * 700)}, "cannot be compiled: "),
        ({"form": CHOICES, "min_new_tokens": 2}, "min_new_tokens goes on where the form"),
        ({"form": CHOICES, "ignore_eos": True}, "ignore_eos goes on where the form"),
    ],
)
def test_what_cannot_be_compiled_is_the_rows_error(
    make_engine: Any, options: dict[str, Any], reason: str
) -> None:
    good, bad = make_request(0), make_request(1, **options)
    engine = make_engine()
    failed = engine.check(bad)
    assert failed is not None
    assert reason in (failed.error or "")
    answered, refused = engine.generate([good, bad])
    assert (answered.error, refused) == (None, failed)


def test_what_the_models_own_settings_leave_nothing_of_is_an_error(
    make_engine: Any, model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.generation_config, "suppress_tokens", list(range(len(processor.tokenizer))))
    (completion,) = make_engine().generate([make_request(0, form=CHOICES)])
    assert "the model's generation config" in (completion.error or "")


@pytest.mark.parametrize("family", list(TINY))
def test_tokenizers_of_all_kinds_write_what_the_form_allows(family: str, tmp_path: Any) -> None:
    tokenizer = load_tiny(family, tmp_path).processor.tokenizer
    grammars = Grammars(tokenizer, end_ids(tokenizer))
    for seed, form in enumerate([JSON, CHOICES, REGEX] * 5):
        check(form, write_at_random(tokenizer, grammars, form, torch.Generator().manual_seed(seed)))


def write_at_random(tokenizer: Any, grammars: Grammars, form: Form, generator: torch.Generator) -> str:
    matcher, ids = grammars.matcher(form), []
    while True:
        scores = torch.randn(1, len(tokenizer) + 7, generator=generator)
        token = int(allow(scores, [matcher]).argmax())
        if token == tokenizer.eos_token_id:
            return str(tokenizer.decode(ids, skip_special_tokens=True))
        assert matcher.consume_token(token)
        ids.append(token)


PROPERTIES = {"properties": {"a": {"type": "null"}}, "required": ["a"]}
OBJECT = {"type": "object", **PROPERTIES}
AND_MORE = '{"a": null, "b": 1}'


@pytest.mark.parametrize(
    ("schema", "text", "is_allowed"),
    [
        (OBJECT, '{"a": null}', True),
        (OBJECT, AND_MORE, False),
        ({**OBJECT, "additionalProperties": {"type": "integer"}}, AND_MORE, True),
        ({"type": "object"}, AND_MORE, True),
        ({"type": "array", "items": OBJECT}, f"[{AND_MORE}]", False),
        ({"anyOf": [OBJECT, {"type": "null"}]}, AND_MORE, False),
        ({"$ref": "#/$defs/x", "$defs": {"x": OBJECT}}, AND_MORE, False),
        ({"allOf": [OBJECT, {"type": "object", "properties": {"b": {"const": 1}}}]}, AND_MORE, True),
        ({"type": "object", "properties": {"properties": OBJECT}}, f'{{"properties": {AND_MORE}}}', False),
    ],
    ids=str,
)
def test_an_object_has_the_fields_that_its_schema_lists(
    processor: Any, schema: dict[str, Any], text: str, is_allowed: bool
) -> None:
    tokenizer = processor.tokenizer
    matcher = Grammars(tokenizer, end_ids(tokenizer)).matcher(Form(schema=json.dumps(schema)))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (matcher.consume_tokens(ids) and matcher.is_accepting()) == is_allowed


@pytest.mark.parametrize(
    "choice", ["a.b", "a|b", "[x]", "(", "^$", r"\d", "a\nb", "é{2}", "x-y", "~&#", "<|im_end|>"]
)
def test_a_choice_is_the_text_that_it_is(choice: str) -> None:
    grammar = to_grammar(Form(choices=(choice, "other")))
    for text in (choice, "other", "a", "axb", f"{choice[::-1]}!"):
        matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
        taken = matcher.consume_tokens([*text.encode()])
        assert (taken and matcher.is_accepting()) == (text in (choice, "other")), text
