"""Predictions on the hub: a dataset of them with its card, pushed by the same command where it failed."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from helpers.hub import USER, Hub, logged_in, output_of, stand_in
from vlmray.benchmark.job import run_benchmark
from vlmray.benchmark.plan import plan_benchmark
from vlmray.benchmark.suite.job import plan_suite, run_suite
from vlmray.config import BenchmarkConfig, InferConfig
from vlmray.errors import OptionError
from vlmray.inference.job import describe, run_inference
from vlmray.inference.plan import plan_inference
from vlmray.publishing.hub import PushError

REPO = f"datasets/{USER}/answers"
CHARTS = "charts?num_rows=24&questions_per_image=2"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with stand_in() as found, logged_in(found, monkeypatch):
        yield found


def config_of(folder: Path, **options: Any) -> InferConfig:
    given = {"model_id": "fake", "engine": "fake", "dataset_name": CHARTS, "output_dir": str(folder)}
    return InferConfig(**{**given, "sample_slices": "[:20]", "push_to_hub": "answers", **options})


LOAD = """
import sys, datasets
(split, rows), = datasets.load_dataset("jane/answers", *sys.argv[1:]).items()
print(split, len(rows), rows[0]["sample_id"])
"""


def facts(card: str) -> dict[str, str]:
    found = dict(re.findall(r"^- \*\*(.+?)\*\*: (.*)$", card, re.MULTILINE))
    assert all(found.values())
    assert not {"None", "n/a", "–", "nan"} & {*found.values()}
    return found


def test_predictions_with_their_card(two_cpus: None, hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "jane's run"
    hub.broken = "commit"
    with pytest.raises(PushError, match=r"/datasets/jane/answers did not take the result"):
        run_inference(plan_inference(config_of(folder, sample_slices="[:4]")))
    assert (folder / "run.json").exists()
    hub.broken = ""
    run_inference(plan_inference(config_of(folder)))
    rows = pq.read_table(io.BytesIO(hub.repos[REPO]["predictions.parquet"])).to_pylist()
    assert {row["sample_id"] for row in rows} == {f"test-{index:06d}" for index in range(20)}
    card = hub.text(REPO, "README.md")
    found = facts(card)
    assert re.fullmatch(r"[\d.]+ % \(95 % interval .+; 20 samples, 10 images\)", found["exact_match"])
    assert found["rows"] == "[:20] (20)"
    assert found["max_new_tokens"] == "512"
    assert str(tmp_path) not in card
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["configs"] == [
        {"config_name": "default", "data_files": [{"split": "test", "path": "predictions.parquet"}]}
    ]
    assert head["size_categories"] == ["n<1K"]
    assert output_of(hub, LOAD, tmp_path / "home") == "test 20 test-000000\n"


def test_errors_are_pushed_without_paths(two_cpus: None, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    data = tmp_path / "data" / "photos.jsonl"
    data.write_text('{"image": "gone.png", "question": "What?", "answers": "x"}\n')
    run_inference(plan_inference(config_of(tmp_path / "out", dataset_name=str(data), sample_slices="[:]")))
    (row,) = pq.read_table(io.BytesIO(hub.repos[REPO]["predictions.parquet"])).to_pylist()
    assert "gone.png" in row["error"]
    assert str(tmp_path) not in row["error"] + hub.text(REPO, "README.md")
    assert facts(hub.text(REPO, "README.md"))["dataset"] == "photos.jsonl"


def test_a_dry_run_says_where_to(two_cpus: None, hub: Hub, tmp_path: Path) -> None:
    lines = dict(describe(plan_inference(config_of(tmp_path / "out", dry_run=True))))
    assert lines["pushed to"] == f"{hub.url}/datasets/jane/answers"
    assert not hub.repos


def test_a_comparison_is_pushed_once_and_whole(two_cpus: None, hub: Hub, tmp_path: Path) -> None:
    config = BenchmarkConfig(
        models="base=fake,tuned=fake+/home/jane/adapter", engine="fake", dataset_name=CHARTS, offline=True,
        output_dir=str(tmp_path / "out"), push_to_hub="answers", speed_samples=0,
    )  # fmt: skip
    run_benchmark(plan_benchmark(config))
    assert {*hub.repos} == {REPO}
    rows = pq.read_table(io.BytesIO(hub.repos[REPO]["predictions.parquet"])).to_pylist()
    assert len(rows) == 48
    card = hub.text(REPO, "README.md")
    assert facts(card)["tuned"] == "fake + adapter"
    assert "tuned against base: no significant change" in card
    assert "--models base=fake,tuned=fake+adapter" in card
    assert "/home/jane" not in card


def test_several_datasets_are_pushed_as_one(two_cpus: None, hub: Hub, tmp_path: Path) -> None:
    entries = [{"name": name, "dataset_name": f"{CHARTS}&seed={seed}"} for seed, name in enumerate("ab")]
    (tmp_path / "datasets.json").write_text(json.dumps(entries))
    config = BenchmarkConfig(
        models="base=fake,tuned=fake", engine="fake", datasets=str(tmp_path / "datasets.json"), offline=True,
        output_dir=str(tmp_path / "out"), push_to_hub="answers", speed_samples=0,
    )  # fmt: skip
    run_suite(config, plan_suite(config))
    assert {*hub.repos} == {REPO}
    assert {*hub.repos[REPO]} == {"a/predictions.parquet", "b/predictions.parquet", "README.md"}
    card = hub.text(REPO, "README.md")
    facts(card)
    head = yaml.safe_load(card.split("---\n")[1])
    assert [each["config_name"] for each in head["configs"]] == ["a", "b"]
    assert "## Scores, a" in card
    assert "--datasets datasets.json" in card
    assert output_of(hub, LOAD, tmp_path / "home", "b") == "test 48 test-000000\n"


def test_what_has_no_predictions_is_not_pushed() -> None:
    with pytest.raises(OptionError, match="--push_to_hub is about predictions"):
        BenchmarkConfig(models="a=fake", engine="fake", metrics="none", push_to_hub="x")
    with pytest.raises(OptionError, match="--hub_private_repo is about what --push_to_hub makes"):
        InferConfig(sample_slices="[:]", hub_private_repo=True)
