"""Options: one frozen dataclass per job; the text under a field is its `--help`.

Standard library only, so that `--help` and a mistyped option are answered at once. The dataclasses
are what the library's functions take; `parse_args` builds one from a command line and a YAML file.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import math
import sys
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

C = TypeVar("C")

_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class InferConfig:
    """Answer a visual-question dataset with a vision-language model on Ray."""

    model_id: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    """Model on the hub, a local folder, or tiny-random (built in, random weights, needs no network)."""

    adapter: str | None = None
    """PEFT adapter folder to put on the model."""

    dataset_name: str = "HuggingFaceM4/ChartQA"
    """Dataset on the hub, a local folder or file (Parquet, JSONL, ...), s3://, gs:// or hf:// Parquet, or
    the built-in charts, with parameters: 'charts?num_rows=200&seed=7&family=difference'."""

    dataset_config: str | None = None
    """Configuration (subset) of the dataset, where it has several."""

    dataset_split: str = "test"
    """Split to answer."""

    sample_slices: str
    """Rows to answer, as Python slices: '[0:100]', '[:]', '[-5:]', '[::10]', '[7]', '[:10],[50:60]'."""

    output_dir: str = "outputs/vlm"
    """Where results go: a local folder of this machine, or a URI that every node can write. The same
    command with the same folder resumes."""

    output_format: Literal["files", "parquet", "both"] = "both"
    """files: three files per sample; parquet: the same rows as Parquet; or both."""

    overwrite: bool = False
    """Delete what an earlier run left in --output_dir instead of resuming it."""

    max_new_tokens: int = 512
    """Tokens to generate per answer, at most."""

    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""

    top_p: float = 1.0
    """Nucleus sampling: the smallest set of tokens with this probability."""

    seed: int = 0
    """Seed of the sampling; a sampled answer does not depend on batch size or order."""

    system_prompt: str | None = None
    """System message; without it the model's chat template decides."""

    prompt_template: str | None = None
    """User message, with {question} and, for multiple choice, {choices}; default: the dataset's own."""

    image_column: str | None = None
    """Column of the image, for a dataset that is not registered."""

    question_column: str | None = None
    """Column of the question."""

    answer_column: str | None = None
    """Column of the accepted answers: a string, a number or a list of them."""

    family_column: str | None = None
    """Column to break the score down by."""

    metric: str | None = None
    """Metric of the score; default: the dataset's own."""

    engine: Literal["transformers", "fake"] = "transformers"
    """What generates: transformers, or a scripted stand-in for tests of the pipeline."""

    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Load the weights quantized by bitsandbytes."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision; auto: the checkpoint's on a GPU, float32 without one."""

    min_pixels: int | None = None
    """Scale smaller images up to this many pixels; default: the model's processor."""

    max_pixels: int | None = None
    """Scale larger images down to this many pixels; default: the model's processor."""

    trust_remote_code: bool = False
    """Run Python code that the model's repository brings. Only for repositories you trust."""

    batch_size: int = 16
    """Rows per forward pass, at most; halved and remembered when memory runs out."""

    num_replicas: str | None = None
    """Model replicas: N, or MIN,MAX to scale with the work; default: one per GPU, or one without GPUs."""

    gpus_per_replica: float | None = None
    """GPUs of each replica; default: 1 where the cluster has GPUs, else 0."""

    max_errors: int | None = None
    """Stop once more rows than this have failed; default: never stop for failed rows."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Verbosity of the log."""

    def __post_init__(self) -> None:
        # Only an empty system prompt means something; elsewhere it is a shell variable that was not set.
        _not_empty(self, except_for="system_prompt")
        _at_least(self, 1, "max_new_tokens", "batch_size", "min_pixels", "max_pixels")
        _at_least(self, 0, "temperature", "gpus_per_replica", "max_errors")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p must be above 0 and at most 1, got {self.top_p}")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"--min_pixels {self.min_pixels} is above --max_pixels {self.max_pixels}")
        self.replica_range()

    def replica_range(self) -> tuple[int, int] | None:
        """Return the smallest and largest number of replicas, or None where the cluster decides."""
        if self.num_replicas is None:
            return None
        try:
            bounds = [int(part) for part in self.num_replicas.split(",")]
        except ValueError:
            bounds = []
        if len(bounds) not in (1, 2) or not 1 <= bounds[0] <= bounds[-1]:
            raise ValueError(f"--num_replicas must be N or MIN,MAX of at least 1, got {self.num_replicas!r}")
        return bounds[0], bounds[-1]


def _not_empty(config: Any, *, except_for: str) -> None:
    for field in dataclasses.fields(config):
        if getattr(config, field.name) == "" and field.name != except_for:
            raise ValueError(f"--{field.name} is empty")


def _at_least(config: object, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= minimum:  # so written, it refuses NaN too
            raise ValueError(f"--{name} must be at least {minimum}, got {value}")


def parse_args(config_class: type[C], argv: Sequence[str] | None = None, *, prog: str | None = None) -> C:
    """Build a config from a command line; options on it win over those of `--config file.yaml`.

    Hyphens in option names are accepted too. A mistake prints one line on stderr and exits with 2.
    """
    parser = _Parser(prog=prog, description=inspect.getdoc(config_class), allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file of these options; the command line wins")
    helps = field_docs(config_class)
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
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
    for name in options:
        if name not in hints:
            raise ValueError(f"unknown option {name!r}{_suggestion(name, hints)}")
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        if field.default is MISSING and field.name not in options:
            raise ValueError(f"--{field.name} is required: {_first_sentence(config_class, field.name)}")
    return config_class(**{name: _convert(name, hints[name], value) for name, value in options.items()})


def field_docs(config_class: type) -> dict[str, str]:
    """Return the text under each field of a dataclass, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
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
    if hint is bool:
        # `--flag`, `--flag true` and `--flag=false` are all in use among Hugging Face's scripts.
        parser.add_argument(*names, nargs="?", const="true", metavar="BOOL", help=text)
    else:
        metavar = "{" + ",".join(choices) + "}" if choices else field.name.rpartition("_")[2].upper()
        parser.add_argument(*names, metavar=metavar, help=text)


def _convert(name: str, hint: Any, value: Any) -> Any:
    """Turn a string of the command line or a value of a YAML file into the field's type."""
    args = typing.get_args(hint)
    optional = types.NoneType in args
    kind = args[0] if optional else hint
    if value is None:
        if optional:
            return None
        raise ValueError(f"--{name} needs a value")
    if isinstance(value, list | dict):
        raise ValueError(f"--{name} must be one value, got {value!r}; quote it if it is text")
    if _is_literal(kind):
        if value in typing.get_args(kind):
            return value
        raise ValueError(f"--{name} must be one of {', '.join(typing.get_args(kind))}, got {value!r}")
    try:
        if kind is bool:
            return _BOOLS[str(value).lower()]
        converted = kind(str(value))
        if kind is float and not math.isfinite(converted):
            raise ValueError
        return converted
    except (ValueError, KeyError):
        expected = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise ValueError(f"--{name} must be {expected}, got {value!r}") from None


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
        raise ValueError(f"--config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(options, dict):
        raise ValueError(f"--config {path} must hold 'option: value' lines, found {type(options).__name__}")
    return {str(name).lstrip("-").replace("-", "_"): value for name, value in options.items()}


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is Literal


def _suggestion(name: str, known: typing.Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _first_sentence(config_class: type, name: str) -> str:
    return field_docs(config_class).get(name, "see --help").rstrip(".")
