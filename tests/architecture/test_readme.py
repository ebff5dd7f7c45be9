"""What README, docs, examples and docstrings tell people to type is what the commands take."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from helpers.paths import ROOT
from vlmray.builtin.charts import ChartDataset, parse_charts_name
from vlmray.cli import JOBS
from vlmray.config.parsing import field_docs, parse_args

README = (ROOT / "README.md").read_text()
DOCS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))
NUM_EXAMPLES = 4
SOURCES = [ROOT / "Makefile", ROOT / "cluster.yaml", *sorted((ROOT / "jobs").glob("*.py")), *DOCS, *EXAMPLES]
WITHOUT_COMMANDS = {
    "CONTRIBUTING.md", "AGENTS.md", "CHANGELOG.md", "architecture.md", "decisions.md", "engine_contract.md",
    "families.md", "results_format.md",
}  # fmt: skip
"""Documents in which no job may be called; elsewhere a pattern that finds nothing would prove nothing."""


def commands(path: Path) -> list[tuple[str, str]]:
    """Every `vlmray JOB` and `jobs/JOB.py` command of a file: the job and its options."""
    text = re.sub(r"\\\n[#\s]*", "", path.read_text()).replace("$$", "$")
    return re.findall(r"(?:vlmray |python jobs/)(\w+)(?:\.py)?( --[^\n`]*)", text)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_accepted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # commands name their --config from there
    found = [(job, options) for job, options in commands(path) if "--help" not in options]
    assert found or path.name in WITHOUT_COMMANDS
    for job, options in found:
        assert parse_args(JOBS[job].config_class, shlex.split(options, comments=True)).log_level


def test_options_of_the_table_exist() -> None:
    text = "\n".join(path.read_text() for path in DOCS)
    rows = re.findall(r"^\| (`--.*?`) \|", text, flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"--(\w+)", row)}
    assert len(named) >= 60
    assert named <= {name for job in JOBS.values() for name in field_docs(job.config_class)} | {"config"}


def test_every_example_is_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert len(EXAMPLES) == NUM_EXAMPLES
    for path in EXAMPLES:
        name = path.relative_to(ROOT).as_posix()
        first = path.read_text().splitlines()[0]
        found = re.fullmatch(rf"# vlmray (\w+) --config {re.escape(name)}", first)
        assert found, f"{name}: the first line shows the exact command"
        assert parse_args(JOBS[found[1]].config_class, ["--config", name]).log_level


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    links = {link.partition("#")[0] for link in re.findall(r"\]\(((?!https?:)[^)]+)\)", text)}
    gone = [link for link in links if not (path.parent / link).exists()]
    files = set(re.findall(r"`((?:vlmray|tests|benchmarks|jobs|examples|deploy)/[\w./]*)`", text))
    gone += [name for name in files if not (ROOT / name).exists()]
    assert not gone


def test_own_photos_are_what_their_command_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = (ROOT / "examples" / "own_photos.jsonl").read_text().splitlines()
    (options,) = (options for _, options in commands(ROOT / "examples" / "README.md") if "photos" in options)
    config = parse_args(JOBS["infer"].config_class, shlex.split(options))
    for line in lines:
        assert set(json.loads(line)) == {config.image_column, config.question_column, config.answer_column}


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chart.png").write_bytes(ChartDataset(parse_charts_name("charts"), "test")[0]["image"])
    (code,) = re.findall(r"## From Python\n+```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(
        re.findall(r"(?:^|`)make (\w+)", "\n".join(path.read_text() for path in DOCS), re.MULTILINE)
    ):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_ci_runs_what_the_readme_says_runs_the_tests() -> None:
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
