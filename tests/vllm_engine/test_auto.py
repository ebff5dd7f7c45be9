"""`--engine auto` where vLLM is installed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from helpers.clusters import cluster_of, joining
from helpers.processes import command
from vlmray.config import EngineConfig
from vlmray.engines.vllm.options import find_installed
from vlmray.engines.vllm.suitability import find_model_objection

DATA = ["--model_id", "builtin", "--dataset_name", "charts?num_rows=8", "--max_new_tokens", "8"]


@pytest.mark.parametrize(
    ("architecture", "objection"),
    [
        ("Qwen2_5_VLForConditionalGeneration", None),
        ("LlavaForConditionalGeneration", None),
        ("Nobodys", "it does not know the architecture Nobodys"),
    ],
)
def test_vllm_is_asked_what_it_knows(
    tiny_model: Path, tmp_path: Path, architecture: str, objection: str
) -> None:
    config = json.loads((tiny_model / "config.json").read_text()) | {"architectures": [architecture]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find_model_objection(EngineConfig(), str(tmp_path)) == objection
    quantized = config | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "config.json").write_text(json.dumps(quantized))
    objection = objection or "it does not read weights quantized by bitsandbytes"
    assert find_model_objection(EngineConfig(), str(tmp_path)) == objection


def test_gpus_are_answered_by_vllm_and_cpus_go_on_with_it(tmp_path: Path) -> None:
    """The GPU is nominal, and vLLM built for CPUs."""
    installed = find_installed()
    assert installed is not None
    folder = str(tmp_path / "results")

    def run(*options: str, environment: dict[str, str]) -> str:
        done = subprocess.run(
            command("--output_dir", folder, *DATA, *options), env=os.environ | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout

    with cluster_of({"num_cpus": 2, "num_gpus": 1}) as cluster:
        said = run("--sample_slices", "[:4]", environment=joining(cluster))
    assert f"engine: vllm ({installed.version} is installed and the cluster has GPUs)" in said
    manifest = json.loads((tmp_path / "results" / "run.json").read_text())
    assert manifest["options"]["engine"] == manifest["engine"]["name"] == "vllm"
    assert (manifest["summary"]["num_answered"], manifest["summary"]["num_failed"]) == (4, 0)
    on_cpus = {"RAY_ADDRESS": "local"}
    said = run("--sample_slices", "[:]", "--dry_run", environment=on_cpus)
    assert f"engine: vllm ({installed.version}; what is in --output_dir was answered with it)" in said
    said = run(
        "--sample_slices", "[:4]", "--dry_run", "--output_dir", str(tmp_path / "new"), environment=on_cpus
    )
    assert f"engine: transformers (not vLLM {installed.version}: the cluster has no GPU)" in said
