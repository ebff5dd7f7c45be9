"""What an answer has to be, as a grammar: options and requests -> `Form` -> a grammar of llguidance.

JSON is written as Python writes it, on one line: a model that may write any whitespace may go on with it for ever.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llguidance import LLMatcher

from vlmray.config import SamplingConfig
from vlmray.errors import OptionError, one_line
from vlmray.schema import Form

_LAYOUT: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


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


def check_form(form: Form) -> None:
    """Check that a form can be compiled.

    Raises:
        ValueError: It cannot.
    """
    problem = LLMatcher.validate_grammar(to_grammar(form))
    if problem:
        raise ValueError(explain(problem))


def explain(problem: str) -> str:
    """Say on one line what llguidance says of a form that it does not compile."""
    return one_line(f"the form of the answer cannot be compiled: {problem}", 300)


def to_grammar(form: Form) -> str:
    """Write a form as llguidance reads it.

    Raises:
        ValueError: It is a JSON schema that is no object.
    """
    if form.schema is not None:
        return LLMatcher.grammar_from_json_schema(form.schema, overrides=_LAYOUT)
    if form.regex is not None:
        return LLMatcher.grammar_from_regex(form.regex)
    return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, form.choices)))


def _read_schema(path: str) -> str:
    try:
        found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        problem, hint = f"{path}: {error.strerror}", "pass a file of a JSON schema"
        raise OptionError("response_schema", problem, hint) from error
    except ValueError as error:
        raise OptionError("response_schema", f"{path} is no JSON: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise OptionError("response_schema", f"{path} holds no JSON object, and a JSON schema is one")
    return json.dumps(found, ensure_ascii=False)
