"""A dry run says what would be done, and does nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmray.config import FinetuneConfig, InferConfig
from vlmray.finetune.job import describe as describe_training
from vlmray.finetune.plan import plan_finetune
from vlmray.inference.job import describe, run_inference
from vlmray.inference.plan import plan_inference

pytestmark = pytest.mark.usefixtures("two_cpus")


def infer_config(output_dir: Path, **options: object) -> InferConfig:
    return InferConfig(
        engine="fake", model_id="fake", dataset_name="charts?num_rows=12", output_dir=str(output_dir),
        **{"sample_slices": "[:]", **options},
    )  # fmt: skip


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_nothing_is_made(tmp_path: Path) -> None:
    lines = dict(describe(plan_inference(infer_config(tmp_path / "out", dry_run=True))))
    assert lines["rows"] == "12: 0 answered already, 12 to answer"
    assert lines["engine"] == "fake (as --engine says)"
    assert lines["replicas"] == "1 with 1 CPU"
    assert lines["nodes"].endswith(": 1")
    assert lines["outputs"] == f"{tmp_path}/out (both)"
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    run_inference(plan_inference(infer_config(tmp_path, sample_slices="[:5]")))
    (tmp_path / "test-000003_out.json").unlink()
    (tmp_path / "predictions" / f".part-{'0' * 32}.tmp").touch()
    before = snapshot(tmp_path)
    for options, expected in (
        ({}, "12: 4 answered already, 8 to answer"),
        ({"sample_slices": "[:3]"}, "3: 3 answered already, 0 to answer"),
        ({"overwrite": True}, "12: 0 answered already, 12 to answer"),
    ):
        lines = dict(describe(plan_inference(infer_config(tmp_path, dry_run=True, **options))))
        assert lines["rows"] == expected
        assert ("replicas" in lines) == ("0 to" not in expected)
        assert snapshot(tmp_path) == before


def test_mistakes_are_found(tmp_path: Path) -> None:
    run_inference(plan_inference(infer_config(tmp_path, sample_slices="[:2]")))
    with pytest.raises(ValueError, match="holds another run"):
        plan_inference(infer_config(tmp_path, dry_run=True, max_new_tokens=3))


def test_training_is_described(tmp_path: Path, tiny_model: Path) -> None:
    config = FinetuneConfig(
        model_id=str(tiny_model), dataset_name="charts?num_rows=20", dataset_split="test", num_workers="2",
        per_device_train_batch_size=2, output_dir=str(tmp_path / "out"), dry_run=True,
    )  # fmt: skip
    lines = dict(describe_training(plan_finetune(config)))
    assert lines["samples"] == "20 to train on"
    assert lines["steps"] == "5 of 4 samples"
    assert lines["workers"].startswith("2 with ")
    assert lines["outputs"] == f"{tmp_path}/out"
    assert not (tmp_path / "out").exists()
