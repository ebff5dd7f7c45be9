"""Mistakes in options and files: one line on stderr that names the option and the fix, and exit code 2."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.paths import ROOT
from helpers.processes import run
from vlmray.cli import run_job
from vlmray.config import FinetuneConfig
from vlmray.config.parsing import parse_args

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
        (f"{CHARTS} --sample_slices [:1] --top_k -1", "--top_k must be at least 0, got -1"),
        (f"{CHARTS} --sample_slices [:1] --min_p 2", "--min_p must be from 0 to 1, got 2.0"),
        (f"{CHARTS} --sample_slices [:1] --repetition_penalty 0", "--repetition_penalty must be from 0.01"),
        (f"{CHARTS} --sample_slices [:1] --presence_penalty 3", "--presence_penalty must be from -2 to 2"),
        (f"{CHARTS} --sample_slices [:1] --frequency_penalty nan", "--frequency_penalty must be a number"),
        (f"{CHARTS} --sample_slices [:1] --max_new_tokens 4 --min_new_tokens 5", "at most max_new_tokens, 4"),
        (f"{CHARTS} --sample_slices [:1] --dataset_split tset", "train, validation, test"),
        (f"{CHARTS} --sample_slices [:1] --question_column query", "image, image_id, question, answers"),
        (f"{CHARTS} --sample_slices [:1] --prompt_template Hello", "--prompt_template"),
        (f"{CHARTS} --sample_slices [:1] --metric acuracy", "--metric"),
        (f"{CHARTS} --sample_slices [:1] --output_dir /dev/null/x", "--output_dir /dev/null/x cannot be"),
        (f"{FAKE} --dataset_name charts?familly=count --sample_slices [:1]", "family"),
        (f"{FAKE} --dataset_name ./no/file.parquet --sample_slices [:1]", "no such file"),
        (f"{FAKE} --sample_slices [:1]", "--dataset_name 'HuggingFaceM4/ChartQA'"),
        ("--dataset_name charts --sample_slices [:1] --model_id ./nowhere", "--model_id ./nowhere"),
        (
            "--dataset_name charts --sample_slices [:1] --model_id builtin --chat_template ./no.jinja",
            "no.jinja: No",
        ),
        (
            "--dataset_name charts --sample_slices [:1] --model_id builtin --chat_template_kwargs "
            "'{\"x\": 1}'",
            "--chat_template_kwargs: 'x' is no variable of the chat template; it has",
        ),
        (
            f"{CHARTS} --sample_slices [:1] --chat_template_kwargs 1",
            "--chat_template_kwargs must be a mapping",
        ),
        (f"{CHARTS} --sample_slices [:1] --response_schema no.json", "--response_schema no.json: No such"),
        (f"{CHARTS} --sample_slices [:1] --response_choices a,b,a", "--response_choices has 'a' twice"),
        (f"{CHARTS} --sample_slices [:1] --response_choices a,,b", "--response_choices has an empty choice"),
        (f"{CHARTS} --sample_slices [:1] --response_choices '[1]'", "--response_choices is no JSON list"),
        (
            f"{CHARTS} --sample_slices [:1] --response_choices a,b --response_regex x",
            "--response_regex is one form of answers, and --response_choices another",
        ),
        (f"{CHARTS} --sample_slices [:1] --response_regex '('", "--response_regex: the form of the answer"),
        (
            f"{CHARTS} --sample_slices [:1] --response_regex a --min_new_tokens 2",
            "--min_new_tokens goes on where --response_regex lets an answer end",
        ),
        (f"{CHARTS} --sample_slices [:1] --system_column family", "is for rows that bring a conversation"),
        ("--dataset_name charts --sample_slices [:1]", "builtin"),
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
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
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
    from vlmray.builtin.random_models import build_tiny_random_model
    from vlmray.engines.fake import build_tiny_random_adapter

    (tmp_path / "schema.json").write_text('{"type": "array", "uniqueItems": true}')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "corrupt.parquet").write_bytes(b"PAR1 this is not Parquet PAR1")
    (tmp_path / "empty").mkdir()
    shutil.copy(tiny_model / "config.json", tmp_path / "empty")
    other = build_tiny_random_model(tmp_path / "other", hidden_size=64)
    adapter = build_tiny_random_adapter(tmp_path / "adapter", other)
    return {"corrupt": tmp_path / "corrupt.parquet", "no_weights": tmp_path / "empty", "adapter": adapter,
            "schema": tmp_path / "schema.json", "list": tmp_path / "list.json"}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (f"{FAKE} --dataset_name {{corrupt}}", "--dataset_name"),
        (f"{CHARTS} --response_schema {{schema}}", "cannot be compiled: Unimplemented keys"),
        (f"{CHARTS} --response_schema {{list}}", "holds no JSON object; pass a file of a JSON schema"),
        ("--dataset_name charts --model_id {no_weights}", "safetensors"),
        ("--dataset_name charts --model_id tiny-random --adapter {adapter}", "does not fit --model_id"),
    ],
)
def test_mistakes_in_files_are_one_line_too(
    options: str, message: str, wrong_files: dict[str, Path], tmp_path: Path
) -> None:
    given = shlex.split(options.format(**wrong_files))
    cache = str(tmp_path / "cache")  # empty: models are built on first use
    done = run(*given, "--sample_slices", "[:1]", "--output_dir", tmp_path / "out", VLMRAY_CACHE=cache)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


Refuse = Callable[[str, str], str]


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Refuse:
    """Run a job that has to refuse its options, in one line and before Ray starts; return what it says."""
    from vlmray import cluster

    monkeypatch.setattr(cluster, "connect", lambda log_level: pytest.fail("Ray was started"))
    monkeypatch.chdir(tmp_path)

    def say(job: str, options: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            run_job(job, shlex.split(options))
        stderr = capsys.readouterr().err
        assert stopped.value.code == 2
        assert stderr.count("\n") == 1
        return stderr

    return say


@pytest.mark.parametrize(
    ("job", "options"),
    [
        ("infer", "--dataset_name charts --sample_slices [:1] --model_id {model}"),
        ("finetune", "--dataset_name charts --sample_slices [:1] --model_id {model}"),
        ("serve", "--model_id {model}"),
        ("benchmark", "--dataset_name charts --sample_slices [:1] --models a={model}"),
    ],
)
def test_every_job_refuses_an_incomplete_model_before_ray_starts(
    job: str, options: str, refuse: Refuse, tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    stderr = refuse(job, options.format(model=model))
    assert stderr.startswith(f"error: --model_id: {model}/model.safetensors is a Git LFS pointer, not")


@pytest.mark.parametrize(
    ("job", "options"),
    [
        ("infer", "--dataset_name data --sample_slices [:1] --model_id builtin --output_dir data/out"),
        ("finetune", "--dataset_name data --model_id builtin --output_dir data/out"),
        ("benchmark", "--dataset_name data --models a=builtin --output_dir data/out"),
    ],
)
def test_every_job_refuses_to_write_into_what_it_reads(
    job: str, options: str, refuse: Refuse, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    stderr = refuse(job, options)
    assert stderr.startswith("error: --output_dir data/out and --dataset_name data lie in one another: ")
    assert not (tmp_path / "data" / "out").exists()


@pytest.mark.parametrize(
    ("job", "options"),
    [
        ("infer", "--dataset_name charts --sample_slices [:1] --engine fake --model_id builtin"),
        ("serve", "--engine fake --model_id builtin"),
        ("benchmark", "--dataset_name charts --sample_slices [:1] --engine fake --models a=builtin"),
    ],
)
def test_a_model_that_is_not_for_the_engine_is_found_before_ray_starts(
    job: str, options: str, refuse: Refuse
) -> None:
    assert refuse(job, options) == (
        "error: --model_id 'builtin' is not for the fake engine; pass fake or fake?name=value&...\n"
    )


@pytest.mark.parametrize(
    ("job", "options"),
    [
        ("infer", "--dataset_name charts --sample_slices [:1] --model_id {model}"),
        ("finetune", "--dataset_name charts --sample_slices [:1] --model_id {model}"),
        ("serve", "--model_id {model}"),
        ("benchmark", "--dataset_name charts --sample_slices [:1] --models a={model}"),
    ],
)
def test_every_job_refuses_an_encoder_decoder_before_ray_starts(
    job: str, options: str, refuse: Refuse, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "florence2"}')
    (tmp_path / "model.safetensors").write_text("not to be read")
    stderr = refuse(job, options.format(model=tmp_path))
    assert stderr.startswith(f"error: --model_id {tmp_path}: florence2 is an encoder-decoder model; ")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "--dataset_name rows.jsonl has no rows in split 't'"),
        ('{"photo": "p.png", "question": "q?", "answer": "a"}', "--image_column is needed: column 'photo'"),
        (
            '{"image": "p.png", "question": ["q?"], "answer": "a"}',
            "--question_column: 'question' holds a list",
        ),
        ('{"image": "p.png", "question"', "--dataset_name rows.jsonl cannot be read: rows.jsonl, line 1: "),
    ],
)
@pytest.mark.parametrize(
    ("job", "options"),
    [
        ("infer", "--sample_slices [:] --model_id tiny-random"),
        ("finetune", "--model_id tiny-random"),
        ("benchmark", "--models a=tiny-random"),
    ],
)
def test_every_job_refuses_rows_that_it_does_not_understand_before_ray_starts(
    job: str, options: str, rows: str, message: str, refuse: Refuse, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(rows)
    stderr = refuse(job, f"{options} --dataset_name rows.jsonl --dataset_split t")
    assert stderr.startswith(f"error: {message}")


# Training


TRAIN = "--model_id tiny-random --dataset_name charts?num_rows=40"


def _mistake_in_training(options: str, folder: Path) -> str:
    """Plan a run as the job does, and return what is wrong with it."""
    from vlmray.finetune.plan import plan_finetune

    config = parse_args(FinetuneConfig, ["--output_dir", str(folder / "out"), *shlex.split(options)])
    with pytest.raises((ValueError, FileNotFoundError)) as error_info:
        plan_finetune(config)
    assert "\n" not in str(error_info.value)
    return str(error_info.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model_id ./nowhere --dataset_name charts", "--model_id ./nowhere: no such folder"),
        (
            "--model_id owner/nowhere --dataset_name charts",
            "--model_id 'owner/nowhere' is not here and the hub",
        ),
        ("--model_id tiny-random --dataset_name ./gone.jsonl", "--dataset_name ./gone.jsonl: no such file"),
        ("--model_id tiny-random", "--dataset_name 'HuggingFaceM4/ChartQA' is not here and the hub cannot"),
        (f"{TRAIN} --dataset_split tset", "--dataset_split: charts: unknown split 'tset'"),
        (f"{TRAIN} --sample_slices [40:]", "--sample_slices '[40:]' selects nothing; the split has 40 rows"),
        (f"{TRAIN} --eval_split tset", "--eval_split: charts: unknown split 'tset'"),
        (f"{TRAIN} --eval_slices [40:]", "--eval_slices '[40:]' selects nothing; the split has 40 rows"),
        (f"{TRAIN} --eval_split test --eval_slices :x", "--eval_slices ':x' is not a list of Python slices"),
        (f"{TRAIN} --answer_column label", "--answer_column: charts?num_rows=40 has no column 'label'"),
        (f"{TRAIN} --prompt_template Hello", "--prompt_template: prompt template 'Hello' does not contain"),
        (f"{TRAIN} --lora_target_modules q_proj,zzz", "matches the LoRA target 'zzz'; its linear layers: "),
        (f"{TRAIN} --lora_target_modules (", "--lora_target_modules '(' is neither names with commas"),
        (f"{TRAIN} --lora_target_modules q_proj --lora_vision", "--lora_target_modules q_proj says which"),
        (f"{TRAIN} --sft_config '{{\"max_grad\": 1}}'", "--sft_config: SFTConfig has no field 'max_grad'"),
        (f'{TRAIN} --sft_config \'{{"max_grad_norm": "x"}}\'', "--sft_config: max_grad_norm"),
        (
            f"{TRAIN} --sft_config '{{\"learning_rate\": 1}}'",
            "--sft_config: learning_rate has an option of its",
        ),
        (f"{TRAIN} --sft_config '{{\"packing\": true}}'", "--sft_config: packing is set by vlmray"),
    ],
)
def test_mistakes_in_training_are_found_without_ray(
    options: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    from vlmray import cluster

    monkeypatch.setattr(cluster, "connect", lambda log_level: pytest.fail("the mistake was not found"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    assert message in _mistake_in_training(options, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("answer", ["", None, []])
def test_rows_without_answers_cannot_be_trained_on(answer: Any, tmp_path: Path) -> None:
    rows = [{"question": "Why?", "image": "a.png", "answer": answer} for _ in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = f"--model_id tiny-random --dataset_name {tmp_path}/rows.jsonl"
    assert (
        "--answer_column: all 3 selected rows of split 'train' have an empty 'answer'"
        in _mistake_in_training(options, tmp_path)
    )
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"question": "Why?"}) for _ in rows))
    assert _mistake_in_training(options, tmp_path).startswith(
        "--answer_column is needed to train; the columns"
    )


@pytest.mark.usefixtures("two_cpus")
def test_what_the_cluster_cannot_do(tmp_path: Path) -> None:
    assert _mistake_in_training(f"{TRAIN} --num_workers 99", tmp_path).startswith(
        "--num_workers 99 needs 99 "
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("two_cpus")
def test_an_output_folder_is_for_one_run(tmp_path: Path) -> None:
    from vlmray.finetune.plan import plan_finetune

    message = _mistake_in_training(f"{TRAIN} --resume", tmp_path)
    assert message == f"--output_dir {tmp_path}/out holds no run to go on with; leave out --resume"
    config = parse_args(FinetuneConfig, [*shlex.split(TRAIN), "--output_dir", str(tmp_path / "out")])
    folder = plan_finetune(config).folder
    (tmp_path / "out" / "checkpoints").mkdir()
    assert "holds an earlier run; pass --resume" in _mistake_in_training(TRAIN, tmp_path)
    for changed in (
        "--lora_r 8",
        "--sample_slices [:9]",
        "--gradient_accumulation_steps 2",
        "--use_peft false",
    ):
        assert "holds another run (" in _mistake_in_training(f"{TRAIN} --resume {changed}", tmp_path)
    assert (tmp_path / "out" / "checkpoints").is_dir()
    plan_finetune(replace(config, resume=True))
    plan_finetune(replace(config, resume=True, save_steps=7, eval_split="test", max_errors=1))
    assert (tmp_path / "out" / "checkpoints").is_dir()
    plan_finetune(replace(config, overwrite=True, lora_r=8))
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert folder.read_options()["lora_r"] == 8


@pytest.mark.usefixtures("two_cpus")
@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_training_folder_that_cannot_be_written(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = _mistake_in_training(f"{TRAIN} --output_dir {tmp_path}/{folder}", tmp_path)
    assert message.startswith(f"--output_dir {tmp_path}/{folder} cannot be written: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (f"{TRAIN} --use_peft false --quantization 4bit", "--quantization 4bit needs LoRA"),
        (f"{TRAIN} --optim adamm", "--optim 'adamm' is unknown; known: muon, adamw_torch"),
        (f"{TRAIN} --lora_target_modules zzz", "matches the LoRA target 'zzz'"),
    ],
)
def test_a_mistake_ends_the_training_job_with_one_line(options: str, message: str, tmp_path: Path) -> None:
    job = [sys.executable, str(ROOT / "jobs" / "finetune.py"), *shlex.split(options)]
    done = subprocess.run(job, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr


def test_help_does_not_wait_for_torch_or_ray() -> None:
    code = "import sys, vlmray.cli\ntry: vlmray.cli.main()\nfinally: print([*sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, "infer", "--help"], capture_output=True, text=True)
    assert "--sample_slices" in done.stdout
    loaded = set(re.findall(r"'(\w+)'", done.stdout.splitlines()[-1]))
    assert not loaded & {"torch", "ray", "transformers", "datasets", "pyarrow"}
