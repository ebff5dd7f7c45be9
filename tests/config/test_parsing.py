"""Options: every type and spelling, the YAML file, and one line for each mistake."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from vlmray.config import FinetuneConfig, InferConfig
from vlmray.config.parsing import build_config, field_docs, parse_args

HEAVY = ("torch", "ray", "transformers", "pyarrow", "datasets", "numpy", "PIL", "yaml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Every:
    """One option of each kind."""

    name: str
    """A text. It has two sentences."""

    num_rows: int = 3
    """A whole number."""

    learning_rate: float = 0.5
    """A number."""

    overwrite: bool = False
    """A flag."""

    output_format: Literal["files", "parquet"] = "files"
    """One of two,
    over two lines."""

    adapter: str | None = None
    """A text, or nothing."""

    max_pixels: int | None = None
    """A whole number, or nothing: 100 % of it."""

    dtype: Literal["auto", "float32"] | None = None
    """One of two, or nothing."""

    bf16: bool | None = None
    """A flag, or nothing."""

    settings: dict[str, Any] | None = None
    """A mapping, or nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Longer(Every):
    """Extends the other."""

    num_rows: int = 9
    """Said anew."""

    overwrite: bool = True

    more: str = "x"
    """Only here."""


def _parse(*argv: str) -> Every:
    return parse_args(Every, ["--name", "x", *argv])


def _mistake(capsys: pytest.CaptureFixture[str], config_class: type, *argv: str) -> str:
    """Return the one line that a mistake prints."""
    with pytest.raises(SystemExit) as exit_info:
        parse_args(config_class, argv)
    out, err = capsys.readouterr()
    assert exit_info.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err.removeprefix("error: ").rstrip("\n")


def test_defaults_and_every_type() -> None:
    assert _parse() == Every(name="x")
    given = _parse(
        "--num_rows", "7", "--learning_rate", "1e-4", "--overwrite", "--output_format", "parquet",
        "--adapter", "a b", "--max_pixels", "9", "--dtype", "float32", "--bf16", "--settings", '{"a": 1}',
    )  # fmt: skip
    assert given == Every(
        name="x", num_rows=7, learning_rate=1e-4, overwrite=True, output_format="parquet",
        adapter="a b", max_pixels=9, dtype="float32", bf16=True, settings={"a": 1},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--overwrite"], True),
        (["--overwrite", "true"], True),
        (["--overwrite", "True"], True),
        (["--overwrite=yes"], True),
        (["--overwrite=1"], True),
        (["--overwrite=false"], False),
        (["--overwrite", "FALSE"], False),
        (["--overwrite", "no"], False),
        (["--overwrite", "0"], False),
        (["--overwrite", "--num_rows", "2"], True),
        ([], False),
    ],
)
def test_flags_are_spelled_in_many_ways(argv: list[str], expected: bool) -> None:
    assert _parse(*argv).overwrite is expected


def test_a_flag_that_is_not_given_is_neither_true_nor_false() -> None:
    assert [_parse(*argv).bf16 for argv in ([], ["--bf16"], ["--bf16", "no"], ["--bf16=1"])] == [
        None, True, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", {}),
        ('{"rate": 0.5, "tf32": true, "name": null}', {"rate": 0.5, "tf32": True, "name": None}),
        ('{"a-b": [1, "2"], "c": {"d": 1e-3}}', {"a-b": [1, "2"], "c": {"d": 1e-3}}),
    ],
)
def test_a_mapping_is_json(text: str, expected: dict[str, Any], yaml_file: Any) -> None:
    assert _parse("--settings", text).settings == _parse(f"--settings={text}").settings == expected
    assert parse_args(Every, ["--config", yaml_file(f"name: x\nsettings: '{text}'")]).settings == expected
    assert build_config(Every, {"name": "x", "settings": expected}).settings == expected


def test_hyphens_in_option_names() -> None:
    assert _parse("--num-rows", "7", "--output-format=parquet") == _parse(
        "--num_rows=7", "--output_format", "parquet"
    )


@pytest.mark.parametrize("value", ["-1", "-5:", "-5:,3", "-", "[-5:]", "-x y", "--5=6"])
def test_values_that_begin_with_a_hyphen(value: str) -> None:
    assert parse_args(Every, [f"--name={value}"]).name == value
    if not value.startswith("--"):
        assert parse_args(Every, ["--name", value, "--num_rows", "4"]) == Every(name=value, num_rows=4)


def test_negative_numbers() -> None:
    assert _parse("--num_rows", "-4", "--learning_rate", "-1e-3") == Every(
        name="x", num_rows=-4, learning_rate=-1e-3
    )


def test_an_option_is_not_taken_for_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected one argument" in _mistake(capsys, Every, "--name", "--overwrite")
    with pytest.raises(SystemExit) as exit_info:
        parse_args(Every, ["--name", "-h"])
    assert exit_info.value.code != 0


def test_the_last_one_counts() -> None:
    assert _parse("--num_rows", "4", "--num-rows", "5").num_rows == 5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_rows", "many"], "--num_rows must be a whole number, got 'many'"),
        (["--num_rows", "1.0"], "--num_rows must be a whole number, got '1.0'"),
        (["--num_rows", ""], "--num_rows must be a whole number, got ''"),
        (["--learning_rate", "fast"], "--learning_rate must be a number, got 'fast'"),
        (["--learning_rate", "nan"], "--learning_rate must be a number, got 'nan'"),
        (["--learning_rate", "inf"], "--learning_rate must be a number, got 'inf'"),
        (["--overwrite", "maybe"], "--overwrite must be true or false, got 'maybe'"),
        (["--output_format", "csv"], "--output_format must be one of files, parquet, got 'csv'"),
        (["--dtype", "int4"], "--dtype must be one of auto, float32, got 'int4'"),
        (["--bf16", "maybe"], "--bf16 must be true or false, got 'maybe'"),
        *(
            (
                ["--settings", text],
                f"--settings must be a mapping in the YAML file or a JSON object, got {shown}",
            )
            for text, shown in {
                "a=1": "'a=1'",
                "{a: 1}": "'{a: 1}'",
                "": "''",
                "[1]": "[1]",
                "5": "5",
                "null": "None",
            }.items()
        ),
        (
            ["--settings", '{"a": NaN}'],
            """--settings must be a mapping in the YAML file or a JSON object, got '{"a": NaN}'""",
        ),
        (["--num_row", "3"], "unknown option --num_row; did you mean --num_rows?; see --help"),
        (["--learning-rat=3"], "unknown option --learning-rat; did you mean --learning_rate?; see --help"),
        (["--zzz"], "unknown option --zzz; see --help"),
        (["--a\nb"], "unknown option --a b; see --help"),
        (["stray"], "unexpected argument stray; see --help"),
        (["--config", "gone.yaml"], "--config gone.yaml: No such file or directory"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _mistake(capsys, Every, "--name", "x", *argv) == message


def test_required_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert _mistake(capsys, Every) == "--name is required: A text. It has two sentences"
    assert _mistake(capsys, InferConfig).startswith("--sample_slices is required: Rows to answer")


def test_help_shows_every_option_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_args(Every, ["--help"], prog="every")
    out = capsys.readouterr().out
    assert exit_info.value.code == 0
    assert "One option of each kind." in out
    assert "100 % of it" in out
    assert "(default: 3)" in out
    assert "(required)" in out
    for field in dataclasses.fields(Every):
        assert out.count(f"\n  --{field.name} ") == 1
    assert "--bf16 [BOOL]" in out
    assert "--num-rows" not in out


@pytest.mark.parametrize("value", [[1, 2], "text", 5, True])
def test_values_that_are_no_mapping(value: Any) -> None:
    with pytest.raises(
        ValueError, match="--settings must be a mapping in the YAML file or a JSON object, got"
    ):
        build_config(Every, {"name": "x", "settings": value})


def test_help_of_what_a_config_extends() -> None:
    docs = field_docs(Longer)
    assert list(docs) == [field.name for field in dataclasses.fields(Longer)]
    assert (docs["num_rows"], docs["overwrite"], docs["more"]) == ("Said anew.", "A flag.", "Only here.")
    assert field_docs(Every)["num_rows"] == "A whole number."
    assert parse_args(Longer, ["--name", "x", "--more", "y"]) == Longer(name="x", more="y", num_rows=9)


# The YAML file


@pytest.fixture
def yaml_file(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        path = tmp_path / "options.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_the_command_line_wins_over_yaml(yaml_file: Any) -> None:
    path = yaml_file("name: from yaml\nnum_rows: 8\nlearning-rate: 1e-4\noverwrite: true\nadapter: null\n")
    assert parse_args(Every, ["--config", path]) == Every(
        name="from yaml", num_rows=8, learning_rate=1e-4, overwrite=True
    )
    assert parse_args(Every, ["--num_rows", "9", f"--config={path}", "--overwrite=false"]) == Every(
        name="from yaml", num_rows=9, learning_rate=1e-4
    )


def test_a_mapping_in_yaml(yaml_file: Any) -> None:
    path = yaml_file(
        "name: x\nsettings:\n  max-grad: 1e-3\n  tf32: no\n  names: [a, b]\n  more:\n    end: 007\nbf16: no\n"
    )
    expected = {"max-grad": "1e-3", "tf32": "no", "names": ["a", "b"], "more": {"end": "007"}}
    config = parse_args(Every, ["--config", path])
    assert config == Every(name="x", settings=expected, bf16=False)
    assert parse_args(Every, ["--config", path, "--settings", '{"b": 1}']).settings == {"b": 1}
    nothing = yaml_file("name: x\nsettings:\nbf16: null\n")
    assert parse_args(Every, ["--config", nothing]) == Every(name="x")


@pytest.mark.parametrize(
    "text", ["1:30", "no", "on", "1.10", "007", "2024-01-01", "1_000", "0x10", "[0:100]", "[1:30]", "~x"]
)
def test_yaml_values_are_taken_as_they_are_written(text: str, yaml_file: Any) -> None:
    assert parse_args(Every, ["--config", yaml_file(f"name: '{text}'")]).name == text
    if not text.startswith("["):
        assert parse_args(Every, ["--config", yaml_file(f"name: {text}")]).name == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_row: 3", "unknown option 'num_row'; did you mean num_rows?"),
        ("num_rows: many", "--num_rows must be a whole number, got 'many'"),
        ("num_rows: 1.5", "--num_rows must be a whole number, got '1.5'"),
        ("num_rows:", "--num_rows needs a value"),
        ("overwrite: maybe", "--overwrite must be true or false, got 'maybe'"),
        ("output_format: csv", "--output_format must be one of files, parquet, got 'csv'"),
        ("name: [1:30]", "--name must be one value, got ['1:30']; quote it if it is text"),
        (
            "settings: [a, b]",
            "--settings must be a mapping in the YAML file or a JSON object, got ['a', 'b']",
        ),
        ("settings: a", "--settings must be a mapping in the YAML file or a JSON object, got 'a'"),
        ("name: {a: b}", "--name must be one value, got {'a': 'b'}; quote it if it is text"),
        ("[name, num_rows]", "--config {path} must hold 'option: value' lines, found list"),
        ("just text", "--config {path} must hold 'option: value' lines, found str"),
    ],
)
def test_mistakes_in_yaml(
    text: str, message: str, yaml_file: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = yaml_file(text)
    found = _mistake(capsys, Every, "--config", path, *([] if "name:" in text else ["--name", "x"]))
    assert found == message.replace("{path}", path)


@pytest.mark.parametrize(
    "text",
    ["name: [", "name: 'x", "a: b: c", "name: !!python/object:os.system {}", "\tname: x", "name: \x00"],
)
def test_a_file_that_is_not_yaml(text: str, yaml_file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = yaml_file(text)
    assert _mistake(capsys, Every, "--config", path).startswith(f"--config {path} is not YAML: ")


def test_a_yaml_file_that_is_a_folder_or_binary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _mistake(capsys, Every, "--config", str(tmp_path)).endswith("Is a directory")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\xd8")
    assert "is not YAML" in _mistake(capsys, Every, "--config", str(tmp_path / "binary"))


def test_plain_values_build_a_config() -> None:
    values = {"name": "x", "num_rows": 4, "overwrite": True, "max_pixels": None, "learning_rate": 1}
    config = build_config(Every, values)
    assert config == Every(name="x", num_rows=4, overwrite=True, learning_rate=1.0)
    assert isinstance(config.learning_rate, float)
    with pytest.raises(ValueError, match="--num_rows needs a value"):
        build_config(Every, {"name": "x", "num_rows": None})


# The real options


@pytest.mark.parametrize("config_class", [InferConfig, FinetuneConfig])
@pytest.mark.parametrize("value", ["-1", "-5:", "[-5:]", "[::-1]", ":10,-3"])
def test_sample_slices_from_the_end(value: str, config_class: Any) -> None:
    assert parse_args(config_class, ["--sample_slices", value]).sample_slices == value


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["infer", "--help"], 0),
        (["finetune", "--help"], 0),
        (["finetune", "--sft_config", "[]"], 2),
        (["infr"], 2),
    ],
)
def test_help_and_mistakes_import_nothing_heavy(argv: list[str], code: int) -> None:
    script = (
        "import sys\n"
        "from vlmray.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        f"    print('heavy:', *sorted(set({HEAVY!r}) & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *argv], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["heavy:"]
    assert done.stderr.count("\n") == (0 if code == 0 else 1)
    assert code != 0 or "--sample_slices" in done.stdout
