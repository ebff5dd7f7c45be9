"""Jobs go on, and end with their own exit code, whatever their streams and their locale are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT

SCRIPT = """
import sys
from vlmray.terminal import steady_streams
steady_streams()
print((chr(233) + chr(0xdcff)) * 10_000, flush=True)
print("lost", file=sys.stderr)
open(sys.argv[1], "w").write("written")
sys.exit(3)
"""


@pytest.mark.parametrize(
    "redirection",
    ["", "| true", "| head -c 1", ">/dev/full", ">/dev/full 2>&1", ">&-", "2>&-", "<&- >&- 2>&-"],
)
@pytest.mark.parametrize("locale", ["", "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0"])
def test_what_cannot_be_written_is_lost_and_nothing_else(
    redirection: str, locale: str, tmp_path: Path
) -> None:
    shell = f'{locale} "$0" -c "$1" "$2" {redirection}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", shell, sys.executable, SCRIPT, f"{tmp_path}/out"], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 3
    assert done.stderr in (b"lost\n", b"")
    assert (tmp_path / "out").read_text() == "written"


def test_names_that_are_not_ascii_are_understood_where_python_sees_ascii() -> None:
    code = "import sys; from vlmray.terminal import use_utf8; use_utf8(); print(sys.argv[1] == chr(233))"
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, "é"], cwd=ROOT, env=env, capture_output=True, encoding="utf-8"
    )
    assert done.stdout == "True\n", done.stderr


def test_a_job_whose_output_nobody_reads_ends_well() -> None:
    shell = '"$0" jobs/infer.py --help | true; exit ${PIPESTATUS[0]}'
    done = subprocess.run(["bash", "-c", shell, sys.executable], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
