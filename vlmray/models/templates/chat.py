"""The chat template of a job: the checkpoint's or one that was given, with variables that were set for it.

    --chat_template, --chat_template_kwargs -> use_template -> processor.chat_template
    the same, written beside a trained adapter -> adapter_template -> the prompts of that adapter

Variables become a part of the template's text, so whoever has the template has them, and a request can still
set them otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from vlmray.config import LoadingConfig
from vlmray.errors import OptionError, one_line
from vlmray.protocol.templates import is_taken
from vlmray.storage.fingerprints import digest

Config = TypeVar("Config", bound=LoadingConfig)

FILE = "chat_template.jinja"
"""Where a checkpoint or adapter keeps its template."""

_RECORD = "training.json"
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
_IS_TEMPLATE = re.compile(r"\{[{%]")


def read_template(given: str) -> str:
    """Return the template that an option names, or is: what holds Jinja's braces is one.

    Raises:
        OptionError: There is no such file, or no template in it.
    """
    if _IS_TEMPLATE.search(given):
        text = given
    else:
        try:
            text = Path(given).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise OptionError("chat_template", f"{given}: {reason}", "pass a file of Jinja text") from error
    find_variables(text)
    return text


def use_template(processor: Any, config: LoadingConfig) -> None:
    """Have a processor word prompts as the options say.

    Raises:
        OptionError: A variable is none that its template has.
    """
    own = processor.chat_template
    text = read_template(config.chat_template) if config.chat_template else own
    if isinstance(text, Mapping):
        text = text.get("default", "")
    if config.chat_template or config.chat_template_kwargs:
        processor.chat_template = set_variables(text or "", config.chat_template_kwargs or {})


def with_template(config: Config) -> Config:
    """Return options for workers, which need not have the file: with the template itself."""
    if config.chat_template is None:
        return config
    return dataclasses.replace(config, chat_template=read_template(config.chat_template))


def template_fingerprint(config: LoadingConfig) -> dict[str, str]:
    """Return what changes when the template behind a name does; nothing where none was given."""
    if config.chat_template is None:
        return {}
    return {"chat_template_fingerprint": digest(read_template(config.chat_template).encode())}


def check_template(config: LoadingConfig, folder: Path | None) -> None:
    """Check the options on a job's driver, as far as the checkpoint's files are here.

    Raises:
        OptionError: As of `use_template`.
    """
    given = read_template(config.chat_template) if config.chat_template else _stored(folder)
    if given is not None:
        set_variables(given, config.chat_template_kwargs or {})


def set_variables(template: str, values: Mapping[str, Any]) -> str:
    """Return a template in which variables have these values, unless it is called with others.

    >>> set_variables("{{ mood }}", {"mood": "calm"})
    "{% if mood is not defined %}{% set mood = 'calm' %}{% endif %}{{ '' }}{{ mood }}"

    Raises:
        OptionError: The template has no such variable.
    """
    known = find_variables(template) if values else set()
    for name in values:
        if is_taken(name) or name not in known:
            variables = sorted(variable for variable in known if not is_taken(variable))
            has = f"it has {', '.join(variables)}" if variables else "it has none"
            raise OptionError("chat_template_kwargs", f": {name!r} is no variable of the chat template", has)
    lines = (
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}{{{{ '' }}}}"
        for name, value in values.items()
    )
    return "".join(lines) + template


def find_variables(template: str) -> set[str]:
    """Return what a template takes from its caller.

    Raises:
        OptionError: It is no Jinja.
    """
    from jinja2 import Environment, TemplateSyntaxError, meta

    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(_GENERATION.sub("", template))
    except TemplateSyntaxError as error:
        raise OptionError("chat_template", f"is no Jinja: line {error.lineno}: {one_line(error)}") from error
    return meta.find_undeclared_variables(tree)


class AdapterTemplates(dict[str | None, str]):
    """The templates of an engine's adapters, by their names; those of others are not there.

    Args:
        config: If it gives a template, that is used for all.
    """

    def __init__(self, config: LoadingConfig | None = None) -> None:
        super().__init__()
        self._follows = config is None or config.chat_template is None

    def add(self, name: str | None, adapter: str) -> None:
        """Take up what an adapter was trained with."""
        template = adapter_template(adapter) if self._follows else None
        if template is not None:
            self[name] = template


def adapter_template(adapter: str) -> str | None:
    """Return the template that an adapter was trained with, where options gave one; None where its base's."""
    folder = Path(adapter).expanduser()
    try:
        options = json.loads((folder / _RECORD).read_text(encoding="utf-8"))["options"]
        if options.get("chat_template") or options.get("chat_template_kwargs"):
            return (folder / FILE).read_text(encoding="utf-8")
    except (OSError, ValueError, KeyError, AttributeError):
        pass  # an adapter that others trained has no such record
    return None


def _literal(value: Any) -> str:
    """Write a JSON value as Jinja does."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return repr(value) if isinstance(value, str | float | int | bool) else "none"


def _stored(folder: Path | None) -> str | None:
    """Return the template beside a checkpoint's weights."""
    if folder is None:
        return None
    if (folder / FILE).is_file():
        return (folder / FILE).read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
            if isinstance(found, str):
                return found
    return None
