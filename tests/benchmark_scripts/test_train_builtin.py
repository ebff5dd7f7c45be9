"""Training of the built-in model: what its batches are, and the whole command at toy size."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.quality.train_batches import ChartBatches, load, see_images
from benchmarks.quality.train_builtin import TRAINED, WEIGHTS, main, scratch_folder
from benchmarks.quality.train_clock import Clock, scale_of
from helpers.paths import ROOT
from helpers.processes import wait_until
from vlmray.builtin.charts import KINDS, ChartsConfig, ChartsSource, parse_charts_name
from vlmray.builtin.models import BUILTIN_FOLDER, UNTRAINED
from vlmray.builtin.questions import FAMILIES
from vlmray.config import FinetuneConfig
from vlmray.config.parsing import build_config
from vlmray.dataset.columns import get_dataset_columns
from vlmray.engines import build_engine
from vlmray.engines.transformers.attention import pack_attention
from vlmray.models.loading import load_qwen_vl_model_and_processor
from vlmray.models.source import resolve_model_id
from vlmray.schema import GenerationRequest
from vlmray.training.collator import DataCollatorForVLMSFT
from vlmray.training.samples import Conversations, open_images, to_feature

CHARTS = ChartsConfig(num_rows=8000, seed=1, family=",".join(TRAINED), questions_per_image=8)

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def batches() -> ChartBatches:
    return ChartBatches(resolve_model_id(UNTRAINED), CHARTS, batch_size=2)


def features(num_charts: int) -> list[Any]:
    """What the training job makes of the first charts."""
    source = ChartsSource(CHARTS.name, "train")
    spec = get_dataset_columns("charts", source.column_names)
    turns = [range(8 * number, 8 * (number + 1)) for number in range(num_charts)]
    samples = Conversations(source=source, spec=spec, split="train", turns=turns)
    return [to_feature(row) for row in open_images(samples.read(range(num_charts)))]


def test_charts_are_read_as_the_training_job_reads_them(batches: ChartBatches) -> None:
    for number, expected in enumerate(features(8)):
        found = batches.read(number)
        assert found["messages"] == expected["messages"]
        assert found["images"][0].tobytes() == expected["images"][0].tobytes()


def test_a_batch_has_the_loss_and_gradients_of_the_plain_way(batches: ChartBatches) -> None:
    model, processor = load_qwen_vl_model_and_processor(
        resolve_model_id(UNTRAINED), dtype="float32", attn_implementation="sdpa"
    )
    expected = model(**DataCollatorForVLMSFT(processor)(features(6))).loss
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    pack_attention(model)
    batch = batches.make(range(6))
    assert len(set(map(tuple, batch["image_grid_thw"].tolist()))) > 1
    assert batch["pixels"].dtype == torch.uint8
    loss = model(**see_images(model, batch)).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3)


def test_workers_share_the_charts(batches: ChartBatches) -> None:
    found = [batch for batch, _ in zip(load(batches, num_workers=2), range(4), strict=False)]
    for batch, numbers in zip(found, ([0, 2], [1, 3], [4, 6], [5, 7]), strict=True):
        expected = batches.make(numbers)
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_no_room_for_batches_is_said(batches: ChartBatches) -> None:
    with pytest.raises(ValueError, match=r"MiB free, and 100000000 workers need \d+; lower --num_workers"):
        load(batches, num_workers=10**8)


def test_the_schedule_follows_the_clock() -> None:
    assert [round(scale_of(share), 2) for share in (0, 0.015, 0.03, 0.515, 1, 1.1)] == [0, 0.5, 1, 0.5, 0, 0]
    clock = Clock(10.0)
    assert clock.elapsed_s == 0
    clock.start()
    with clock.paused():
        before = clock.elapsed_s
    assert before <= clock.elapsed_s < before + 1


def command(output_dir: Path, *options: str) -> list[str]:
    module = [sys.executable, "-m", "benchmarks.quality.train_builtin", "--output_dir", str(output_dir)]
    return [*module, "--batch_size", "4", "--num_charts_to_check", "4", *options]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("trained") / "model"
    done = subprocess.run(
        command(folder, "--minutes", "0.3", "--num_workers", "1", "--check_every_minutes", "0.2"),
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_it_learns(trained: tuple[Path, dict[str, Any]]) -> None:
    _, figures = trained
    assert 0.3 <= figures["training_min"] < 0.8
    assert figures["num_charts"] == 4 * figures["num_steps"]
    assert figures["last_loss"] < 0.8 * figures["first_loss"]


def test_the_folder_is_a_model_that_answers(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = trained
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in BUILTIN_FOLDER.iterdir()
    )
    assert (folder / "model.safetensors").stat().st_size == (
        BUILTIN_FOLDER / "model.safetensors"
    ).stat().st_size
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (folder, BUILTIN_FOLDER))
    assert {**ours, "use_cache": False} == theirs | {"transformers_version": ours["transformers_version"]}
    feature = features(1)[0]
    request = GenerationRequest(
        request_id="1", messages=feature["messages"][:1], images=feature["images"], max_new_tokens=4
    )
    engine = build_engine(engine="transformers", model_id=str(folder), dtype="float32")
    (completion,) = engine.generate([request])
    engine.close()
    assert completion.error is None
    assert completion.num_completion_tokens > 0


def test_card_and_recipe_tell_how_it_came_about(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, figures = trained
    card = (folder / "README.md").read_text()
    assert f"python -m benchmarks.quality.train_builtin --output_dir {folder}" in card
    assert f"{figures['num_charts']:,} charts of `charts?kind=bar,hbar,line,pie&style=varied`" in card
    assert f"| family | {' | '.join(KINDS)} |" in card
    # As tests/builtin/test_checkpoint.py reads the card of the built-in model.
    found = re.findall(r"^\| (\w+)(?: \(untrained\))? \| ([\d,]+) \| ([\d.]+) \|$", card, flags=re.MULTILINE)
    assert {family for family, _, _ in found} == set(FAMILIES)
    assert {number for _, number, _ in found} == {"4"}
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    charts = parse_charts_name(build_config(FinetuneConfig, recipe).dataset_name)
    assert charts.families == TRAINED
    assert charts.kinds == KINDS
    assert charts.num_rows == 8 * figures["num_charts"]
    assert charts.questions_per_image == recipe["max_turns"]


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train_builtin.py", "--output_dir", str(tmp_path)])
    with pytest.raises(
        SystemExit, match=f"^--output_dir {tmp_path} exists; pass --overwrite to replace it, or"
    ):
        main()


@pytest.mark.parametrize(
    ("error", "trained", "left"),
    [(RuntimeError, False, 0), (RuntimeError, True, 1), (SystemExit, True, 1), (KeyboardInterrupt, True, 0)],
)
def test_only_trained_weights_outlive_a_failure(
    tmp_path: Path, error: type[BaseException], trained: bool, left: int
) -> None:
    def fail() -> None:
        with scratch_folder(tmp_path / "model") as folder:
            if trained:
                (folder / WEIGHTS).touch()
            raise error

    with pytest.raises(error):
        fail()
    assert len(list(tmp_path.iterdir())) == left


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [("--minutes", "0", "--minutes must be more than 0, got 0.0"), ("--kind", "bars", "unknown kind 'bars'")],
)
def test_mistakes_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, value: str, reason: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_builtin.py", "--output_dir", "new", option, value])
    with pytest.raises(SystemExit):
        main()
    assert reason in capsys.readouterr().err.splitlines()[-1]


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as file:
        running = subprocess.Popen(
            command(tmp_path / "new" / "model", "--num_workers", "2"),
            cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            wait_until(lambda: "step " in log.read_text() or running.poll() is not None)
            assert running.poll() is None, log.read_text()
            os.killpg(running.pid, signal.SIGINT)  # as a terminal does
            running.wait(timeout=60)
            wait_until(lambda: not is_alive(running.pid), timeout_s=20)
        finally:
            if is_alive(running.pid):
                os.killpg(running.pid, signal.SIGKILL)
    assert list((tmp_path / "new").iterdir()) == []


def is_alive(group: int) -> bool:
    """Tell whether any process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
