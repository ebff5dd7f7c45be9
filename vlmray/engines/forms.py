"""What an answer has to be, as a grammar: options and requests -> `Form` -> a grammar of llguidance.

JSON is written as Python writes it, on one line: a model that may write any whitespace may go on with it for
ever.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any, NoReturn

from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from jsonschema_specifications import REGISTRY
from llguidance import LLMatcher, LLTokenizer

from vlmray.config import SamplingConfig
from vlmray.config.parsing import read_json_file
from vlmray.errors import OptionError, one_line
from vlmray.schema import Form

_LAYOUT: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_MOST_PLACES = 100_000

_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~]")
"""What means something in Rust's expressions."""

_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_OF_MEMBERS = ("items", "prefixItems", "additionalProperties")
_OPEN = {
    "additionalProperties", "unevaluatedProperties", "patternProperties", "anyOf", "oneOf", "$ref", "if"
}  # fmt: skip
"""What says itself what else an object may have."""


def read_form(config: SamplingConfig) -> Form | None:
    """Return what the options want answers to be.

    Raises:
        OptionError: The file is not there, or nothing can be compiled to it.
    """
    if config.response_schema is not None:
        name, form = "response_schema", Form(schema=_read_schema(config.response_schema))
    elif config.response_choices is not None:
        name, form = "response_choices", Form(choices=config.choices())
    elif config.response_regex is not None:
        name, form = "response_regex", Form(regex=config.response_regex)
    else:
        return None
    try:
        check_form(form)
    except ValueError as error:
        raise OptionError(name, f": {error}") from error
    return form


@functools.lru_cache
def check_form(form: Form) -> None:
    """Check that a form can be compiled.

    Raises:
        ValueError: It cannot.
    """
    try:
        _check_counts(form)
        problem = LLMatcher.validate_grammar(to_grammar(form))
    except RecursionError:
        problem = "it is nested too deeply"
    if problem:
        raise ValueError(explain(problem))


def _check_counts(form: Form) -> None:
    """Refuse what would take the memory of the process: each place of an array is compiled."""
    total, parts = 0.0, [json.loads(form.schema)] if form.schema is not None else []
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            counts = [part.get(name) for name in ("minItems", "maxItems")]
            total += max((count for count in counts if isinstance(count, int | float)), default=0)
            parts += part.values()
        elif isinstance(part, list):
            parts += part
    if total > _MOST_PLACES:
        raise ValueError(
            f"the schema's arrays have {total:,.0f} places; at most {_MOST_PLACES:,} are compiled"
        )


def explain(problem: str) -> str:
    """Say on one line what llguidance says of a form that it does not compile."""
    return one_line(f"the form of the answer cannot be compiled: {problem}", 300)


def to_grammar(form: Form) -> str:
    """Write a form as llguidance reads it."""
    if form.schema is not None:
        return LLMatcher.grammar_from_json_schema(with_layout(form.schema))
    return LLMatcher.grammar_from_regex(form.regex or as_regex(form.choices))


@functools.lru_cache
def as_regex(choices: tuple[str, ...]) -> str:
    """Write choices as an expression: many of them are compiled in half the time that a grammar takes."""
    return "|".join(_SPECIAL.sub(r"\\\g<0>", choice) for choice in choices)


def with_layout(schema: str) -> dict[str, Any]:
    """Return a schema that says, to llguidance, how JSON is written, and of objects what is left unsaid.

    An object whose properties are listed has no others, unless the schema says that it may: whatever keeps
    this keeps the schema, and a model does not go on with names of its own.
    """
    found = json.loads(schema)
    # Parts of one object may list properties each.
    found = found if '"allOf"' in schema else _closed(found)
    return {**found, "x-guidance": _LAYOUT}


def _closed(schema: Any, *, is_whole: bool = True) -> Any:
    """Close the objects of a schema, or of one that is the whole of what is said of an object."""
    if isinstance(schema, list):
        return [_closed(each, is_whole=is_whole) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _NAMED and isinstance(value, dict):
            value = {each: _closed(part) for each, part in value.items()}
        elif name in _OF_MEMBERS:
            value = _closed(value)
        elif name in ("anyOf", "oneOf"):
            value = _closed(value, is_whole="properties" not in schema)
        found[name] = value
    closes = is_whole and bool(schema.get("properties")) and not schema.keys() & _OPEN
    return found | {"additionalProperties": False} if closes else found


def keeps(form: Form, text: str) -> bool:
    """Tell whether a text is what was wanted."""
    if form.schema is None:
        return _is_accepted(form, text)
    if not parses(text):
        return False
    try:
        return _validator(form.schema).is_valid(json.loads(text))
    except Exception:  # it has a pattern that Python cannot read, or names what it cannot find
        return _is_accepted(form, text)


def _is_accepted(form: Form, text: str) -> bool:
    matcher = _matcher(form).deep_copy()
    return matcher.consume_tokens([*text.encode("utf-8", "replace")]) and matcher.is_accepting()


@functools.lru_cache
def _matcher(form: Form) -> LLMatcher:
    return LLMatcher(_bytes(), to_grammar(form), log_level=0)


def parses(text: str) -> bool:
    """Tell whether a text is JSON."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def example_of(form: Form, most_bytes: int = 10_000) -> str:
    """Return a short text of a form.

    >>> example_of(Form(regex="[0-9]+ (km|m)"))
    '0 km'
    >>> example_of(Form(schema='{"type": "array", "items": {"type": "string"}, "minItems": 2}'))
    '["", ""]'

    Raises:
        ValueError: It cannot be compiled, or none was found.
    """
    check_form(form)
    tokenizer = _bytes()
    matcher, written = _matcher(form).deep_copy(), bytearray()
    while len(written) < most_bytes:
        allowed = {token for token, bias in enumerate(matcher.compute_logit_bias()) if bias}
        if tokenizer.eos_token in allowed:
            return written.decode()
        in_string = {*b'"a'} <= allowed
        ends = b'"' if in_string else b'}]"'
        token = next((each for each in ends if each in allowed), min(allowed))
        matcher.consume_token(token)
        written.append(token)
    raise ValueError(f"no text of at most {most_bytes} bytes was found for the form {form}")


@functools.cache
def _bytes() -> LLTokenizer:
    """Return a tokenizer to which every byte is a token."""
    return LLTokenizer("byte")


@functools.lru_cache
def _validator(schema: str) -> Validator:
    found = json.loads(schema)
    return validator_for(found)(found, registry=REGISTRY)  # which fetches nothing


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _read_schema(path: str) -> str:
    found = read_json_file("response_schema", path, dict, "pass a file of a JSON schema, which is an object")
    return json.dumps(found, ensure_ascii=False)
