"""What ends a job: one line, the right exit code, and a traceback only for a fault of the program itself."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from vlmray import cli
from vlmray.errors import OptionError, RunError


def _end(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    def fail(config: Any) -> int:
        raise error

    monkeypatch.setitem(cli.JOBS, "infer", cli.Job(cli.InferConfig, fail, "all is kept"))
    with pytest.raises(SystemExit) as stopped:
        cli.run_job("infer", ["--sample_slices", "[:1]"])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OptionError("seed", "is wrong"), 2, "--seed is wrong"),
        (FileNotFoundError("--model_id x: no such folder"), 2, "--model_id x: no such folder"),
        (RunError("a replica died"), 1, "a replica died; all is kept"),
        (KeyboardInterrupt(), 130, "interrupted; all is kept"),
        (
            PermissionError(13, "Permission denied", "/x"),
            1,
            "[Errno 13] Permission denied: '/x'; all is kept",
        ),
        (ConnectionError("lost\nthe cluster"), 1, "lost the cluster; all is kept"),
        (
            ray.exceptions.RaySystemError("the head died"),
            1,
            "RaySystemError: System error: the head died; all",
        ),
    ],
)
def test_what_ends_a_job_is_one_line(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert _end(error, monkeypatch) == code
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"error: {line}")
    assert stderr.count("\n") == 1


def test_a_fault_of_the_program_says_so_below_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert _end(KeyError("nowhere"), monkeypatch) == 1
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "Traceback (most recent call last):"
    assert last == "error: this is a fault of vlmray: please report it with the lines above; all is kept"


def test_an_option_that_is_not_utf8_is_named() -> None:
    from vlmray.config.parsing import build_config

    with pytest.raises(OptionError, match=r"--output_dir 'a\\udcff' is not UTF-8"):
        build_config(cli.InferConfig, {"sample_slices": "[:1]", "output_dir": "a\udcff"})
    assert build_config(cli.InferConfig, {"sample_slices": "[:1]", "output_dir": "é"}).output_dir == "é"


@pytest.mark.parametrize("option", ["model_id", "dataset_name", "adapter", "output_dir"])
def test_the_home_of_nobody_is_a_mistake(option: str) -> None:
    from vlmray.config.parsing import build_config

    with pytest.raises(OptionError, match=rf"^--{option} ~nobody-here/x: ~ is the home of a user"):
        build_config(cli.InferConfig, {"sample_slices": "[:1]", option: "~nobody-here/x"})
    for value in ("~/x", "a~b"):
        assert build_config(cli.InferConfig, {"sample_slices": "[:1]", option: value})
    build_config(cli.InferConfig, {"sample_slices": "[:1]", "system_prompt": "~nobody-here/x"})
