"""Mistakes in options and files: one line on stderr that names the option and the fix, and exit code 2."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import run

from vlmray.cli import run_job

FAKE = "--engine fake --model_id fake"
CHARTS = f"{FAKE} --dataset_name charts"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (f"{CHARTS} --sample_slices [0:1:2:3]", "--sample_slices '[0:1:2:3]' is not a list of Python slices"),
        (f"{CHARTS} --sample_slices [5000:]", "the split has 1000 rows"),
        (CHARTS, "--sample_slices is required"),
        (f"{CHARTS} --sample_slices [:1] --batchsize 3", "did you mean --batch_size?"),
        (f"{CHARTS} --sample_slices [:1] --batch_size 0", "--batch_size must be at least 1, got 0"),
        (f"{CHARTS} --sample_slices [:1] --dataset_split tset", "train, validation, test"),
        (f"{CHARTS} --sample_slices [:1] --question_column query", "image, image_id, question, answers"),
        (f"{CHARTS} --sample_slices [:1] --prompt_template Hello", "--prompt_template"),
        (f"{CHARTS} --sample_slices [:1] --metric acuracy", "--metric"),
        (f"{CHARTS} --sample_slices [:1] --output_dir /dev/null/x", "--output_dir /dev/null/x cannot be"),
        (f"{FAKE} --dataset_name charts?familly=count --sample_slices [:1]", "family"),
        (f"{FAKE} --dataset_name ./no/file.parquet --sample_slices [:1]", "no such file"),
        (f"{FAKE} --sample_slices [:1]", "--dataset_name 'HuggingFaceM4/ChartQA'"),
        ("--dataset_name charts --sample_slices [:1] --model_id ./nowhere", "--model_id ./nowhere"),
        ("--dataset_name charts --sample_slices [:1]", "tiny-random"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    options: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run_job("infer", shlex.split(options))
    stderr = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1


@pytest.fixture
def wrong_files(tmp_path: Path, tiny_model: Path, tiny_adapter: Path) -> dict[str, Path]:
    """A corrupt Parquet file, a model folder without weights, and an adapter of another base."""
    from vlmray.testing import build_tiny_random_adapter, build_tiny_random_model

    (tmp_path / "corrupt.parquet").write_bytes(b"PAR1 this is not Parquet PAR1")
    (tmp_path / "empty").mkdir()
    shutil.copy(tiny_model / "config.json", tmp_path / "empty")
    other = build_tiny_random_model(tmp_path / "other", hidden_size=64)
    adapter = build_tiny_random_adapter(tmp_path / "adapter", other)
    return {"corrupt": tmp_path / "corrupt.parquet", "no_weights": tmp_path / "empty", "adapter": adapter}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (f"{FAKE} --dataset_name {{corrupt}}", "--dataset_name"),
        ("--dataset_name charts --model_id {no_weights}", "safetensors"),
        ("--dataset_name charts --model_id tiny-random --adapter {adapter}", "does not fit --model_id"),
    ],
)
def test_mistakes_in_files_are_one_line_too(
    options: str, message: str, wrong_files: dict[str, Path], tmp_path: Path
) -> None:
    given = shlex.split(options.format(**wrong_files))
    done = run(*given, "--sample_slices", "[:1]", "--output_dir", tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_help_does_not_wait_for_torch_or_ray() -> None:
    code = "import sys, vlmray.cli\ntry: vlmray.cli.main()\nfinally: print([*sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, "infer", "--help"], capture_output=True, text=True)
    assert "--sample_slices" in done.stdout
    loaded = set(re.findall(r"'(\w+)'", done.stdout.splitlines()[-1]))
    assert not loaded & {"torch", "ray", "transformers", "datasets", "pyarrow"}
