"""What the README and the docstrings tell people to type is what the commands take."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from vlmray.builtin.charts import ChartDataset, parse_charts_name
from vlmray.cli import JOBS
from vlmray.config.parsing import field_docs, parse_args

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SOURCES = [ROOT / "README.md", ROOT / "Makefile", ROOT / "cluster.yaml", *(ROOT / "jobs").glob("*.py")]


def commands(path: Path) -> list[tuple[str, str]]:
    """Every `vlmray JOB` and `jobs/JOB.py` command of a file: the job and its options."""
    text = re.sub(r"\\\n[#\s]*", "", path.read_text()).replace("$$", "$")
    return re.findall(r"(?:vlmray |python jobs/)(\w+)(?:\.py)?( --[^\n`]*)", text)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_commands_are_accepted(path: Path) -> None:
    found = [(job, options) for job, options in commands(path) if "--help" not in options]
    assert found
    for job, options in found:
        assert parse_args(JOBS[job].config_class, shlex.split(options, comments=True)).log_level


def test_options_of_the_table_exist() -> None:
    rows = re.findall(r"^\| (`--.*?`) \|", README, flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"--(\w+)", row)}
    assert len(named) >= 30
    assert named <= {name for job in JOBS.values() for name in field_docs(job.config_class)} | {"config"}


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
    for target in set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_ci_runs_what_the_readme_says_runs_the_tests() -> None:
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
