"""Command lines and YAML files to dataclasses: a field is an option, the text under it its `--help`.

Standard library only, so that `--help` and a mistyped option are answered at once.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import inspect
import json
import math
import sys
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from vlmray.errors import OptionError, one_line

C = TypeVar("C")
J = TypeVar("J", dict[str, Any], list[Any])

_LARGEST_FILE = 2**20
"""Bytes of a JSON file that an option names."""

_PATHS = ("_dir", "_id", "dataset_name", "adapter", "baseline")

_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse_args(config_class: type[C], argv: Sequence[str] | None = None, *, prog: str | None = None) -> C:
    """Build a config from a command line; options on it win over those of `--config file.yaml`.

    Hyphens in option names are accepted too. A mistake prints one line on stderr and exits with 2.
    """
    parser = _Parser(prog=prog, description=inspect.getdoc(config_class), allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file of these options; the command line wins")
    helps = field_docs(config_class)
    hints = typing.get_type_hints(config_class)
    for field in _options(config_class):
        _add_option(parser, field, hints[field.name], helps.get(field.name, ""))
    given = vars(parser.parse_args(sys.argv[1:] if argv is None else argv))
    path = given.pop("config", None)
    try:
        return build_config(config_class, {**(_read_yaml(path) if path else {}), **given})
    except ValueError as error:
        parser.error(str(error))


def build_config(config_class: type[C], options: Mapping[str, Any]) -> C:
    """Build a config from plain values, as a YAML file gives them.

    Raises:
        ValueError: an option is unknown, missing, of the wrong type or out of range.
    """
    hints = typing.get_type_hints(config_class)
    known = [field.name for field in _options(config_class)]
    for name in options:
        if name not in known:
            raise ValueError(f"unknown option {name!r}{_suggestion(name, known)}")
    converted: dict[str, Any] = {}
    for field in _options(config_class):
        if field.name in options:
            is_json = field.metadata.get("holds_json", False)
            converted[field.name] = _convert(field.name, hints[field.name], options[field.name], is_json)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise OptionError(field.name, f"is required: {_first_sentence(config_class, field.name)}")
    return config_class(**converted)


def read_json_file(option: str, path: str, kind: type[J], expected: str) -> J:
    """Read the JSON file that an option names.

    Args:
        option: Its name.
        path: The file.
        kind: What it has to hold: `dict` or `list`.
        expected: What it should look like, for who has to write it.

    Raises:
        OptionError: It is not there, too large, or holds something else.
    """
    try:
        file = Path(path).expanduser()
        if file.stat().st_size > _LARGEST_FILE:
            raise OptionError(option, f"{path} has more than {_LARGEST_FILE:,} bytes", expected)
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(option, f"{path}: {error.strerror or error}", expected) from error
    except RecursionError as error:
        raise OptionError(option, f"{path} is nested too deeply", expected) from error
    except OptionError:
        raise
    except ValueError as error:
        raise OptionError(option, f"{path} is no JSON: {one_line(error)}", expected) from error
    if not isinstance(found, kind):
        names = {dict: "object", list: "list"}
        raise OptionError(option, f"{path} holds no JSON {names[kind]}", expected)
    return found


def field_docs(config_class: type) -> dict[str, str]:
    """Return the text under each field of a dataclass and of those it extends, on one line."""
    docs: dict[str, str] = {}
    for parent in reversed([cls for cls in config_class.__mro__ if dataclasses.is_dataclass(cls)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                    docs[name] = " ".join(doc.split())
    return docs


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors that suggest the near option."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=_Help, argument_default=argparse.SUPPRESS, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(self._join_values(args or ()), namespace)
        if unknown:
            near = _suggestion(unknown[0].partition("=")[0].replace("-", "_").strip("_"), self._names(), "--")
            what = "unknown option" if unknown[0].startswith("-") else "unexpected argument"
            self.error(f"{what} {unknown[0].partition('=')[0]}{near}; see --help")
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}\n")

    def _join_values(self, args: Sequence[str]) -> list[str]:
        """Join options to values that begin with a hyphen (`--sample_slices -5:`), as argparse wants them."""
        options = self._option_string_actions
        joined: list[str] = []
        for arg in args:
            before = options.get(joined[-1]) if joined else None
            hyphened = arg.startswith("-") and not arg.startswith("--") and arg not in options
            if hyphened and before is not None and before.nargs is None:
                joined[-1] += f"={arg}"
            else:
                joined.append(arg)
        return joined

    def _names(self) -> list[str]:
        return [action.dest for action in self._actions]


def _options(config_class: type) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(config_class)


class _Help(argparse.HelpFormatter):
    """Shows each option once: the hyphenated spelling works but would double the page."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        options = [option for option in action.option_strings if "-" not in option.lstrip("-")]
        value = "" if action.nargs == 0 else " " + self._format_args(action, action.dest.upper())
        return ", ".join(options) + value


def _add_option(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], hint: Any, doc: str) -> None:
    names = list(dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"]))
    choices = next((typing.get_args(arg) for arg in (hint, *typing.get_args(hint)) if _is_literal(arg)), None)
    default = " (required)" if field.default is MISSING else f" (default: {field.default})"
    text = (doc + ("" if field.default is None else default)).replace("%", "%%")
    if bool in (hint, *typing.get_args(hint)):
        # `--flag`, `--flag true` and `--flag=false` are all in use among Hugging Face's scripts.
        parser.add_argument(*names, nargs="?", const="true", metavar="BOOL", help=text)
    else:
        metavar = "{" + ",".join(choices) + "}" if choices else field.name.rpartition("_")[2].upper()
        parser.add_argument(*names, metavar=metavar, help=text)


def _convert(name: str, hint: Any, value: Any, holds_json: bool) -> Any:
    """Turn a string of the command line or a value of a YAML file into the field's type."""
    args = typing.get_args(hint)
    optional = types.NoneType in args
    kind = args[0] if optional else hint
    if value is None:
        if optional:
            return None
        raise OptionError(name, "needs a value")
    if isinstance(value, str):
        _check_text(name, value)
    if typing.get_origin(kind) is dict:
        found = _read_mapping(name, value)
        return _as_json(found) if holds_json and not isinstance(value, str) else found
    if isinstance(value, list | dict):
        return _as_text(name, value, holds_json)
    if _is_literal(kind):
        if value in typing.get_args(kind):
            return value
        raise OptionError(name, f"must be one of {', '.join(typing.get_args(kind))}, got {value!r}")
    try:
        if kind is bool:
            return _BOOLS[str(value).lower()]
        converted = kind(str(value))
        if kind is float and not math.isfinite(converted):
            raise ValueError
        return converted
    except (ValueError, KeyError):
        expected = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise OptionError(name, f"must be {expected}, got {value!r}") from None


def _as_text(name: str, value: list[Any] | dict[str, Any], holds_json: bool) -> str:
    """Write a mapping of a YAML file as the JSON that an option takes in its place."""
    if holds_json and isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    raise OptionError(name, f"must be one value, got {value!r}", "quote it if it is text")


def _check_text(name: str, value: str) -> None:
    """Refuse text that cannot be written down, and a path in the home of nobody."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise OptionError(name, f"{value!r} is not UTF-8", "rename what it names") from None
    if value.startswith("~") and name.endswith(_PATHS):  # other texts may begin so
        try:
            Path(value).expanduser()
        except RuntimeError:
            raise OptionError(
                name, f"{value}: ~ is the home of a user, and there is no such user here"
            ) from None


def _read_mapping(name: str, value: Any) -> dict[str, Any]:
    """Take a mapping as a YAML file gives it, or written as JSON on the command line."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # said below
            value = json.loads(value, parse_constant=int)  # which refuses NaN and Infinity, no JSON either
    if not isinstance(value, dict):
        raise OptionError(name, f"must be a mapping in the YAML file or a JSON object, got {value!r}")
    return value


def _as_json(value: Any) -> Any:
    """Return what a YAML file holds, where texts that are written as JSON's other values are these."""
    if isinstance(value, dict):
        return {name: _as_json(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_as_json(each) for each in value]
    with contextlib.suppress(ValueError, TypeError):
        return json.loads(value)
    return value


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Leaves values as they are written: YAML would read 1:30 as 90, `no` as false and 1.10 as 1.1."""

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    try:
        options = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise OptionError("config", f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError("config", f"{path} is not YAML: {one_line(error)}") from None
    if not isinstance(options, dict):
        raise OptionError("config", f"{path} must hold 'option: value' lines, found {type(options).__name__}")
    return {str(name).lstrip("-").replace("-", "_"): value for name, value in options.items()}


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is Literal


def _suggestion(name: str, known: typing.Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _first_sentence(config_class: type, name: str) -> str:
    return field_docs(config_class).get(name, "see --help").rstrip(".")
