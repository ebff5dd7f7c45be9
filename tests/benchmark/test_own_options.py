"""Models that are compared may differ in options of their own: followed to the letter, or refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from benchmarks.common.faulty_server import MODEL, Faults, FaultyServer
from helpers.installed import installed_vllm
from vlmray import cluster
from vlmray.benchmark.asking import servers
from vlmray.benchmark.job import run_benchmark
from vlmray.benchmark.plan import plan_benchmark
from vlmray.config import BenchmarkConfig, Candidate
from vlmray.config.parsing import build_config, parse_args

CHARTS = "charts?num_rows=6&seed=5"
SHORT = "base=fake,short=fake+x@max_new_tokens=2@max_pixels=2000"


def config(models: str | dict[str, Any], **options: Any) -> BenchmarkConfig:
    said = models if isinstance(models, str) else json.dumps(models)
    known = {"engine": "fake", "dataset_name": CHARTS, "speed_samples": 0}
    return BenchmarkConfig(models=said, **known | options)


@pytest.mark.parametrize(
    "models",
    [
        SHORT,
        {
            "base": "fake",
            "short": {"model_id": "fake", "adapter": "x", "max_new_tokens": 2, "max_pixels": 2000},
        },
    ],
)
def test_both_ways_to_write_them_say_the_same(models: Any) -> None:
    said = config(models)
    base, short = said.candidates()
    assert base == Candidate("base", "fake")
    assert (short.model_id, short.adapter) == ("fake", "x")
    assert said.of(base) is said
    assert (said.of(short).max_new_tokens, said.of(short).max_pixels) == (2, 2000)
    assert said.max_new_tokens == 64


def test_a_yaml_file_may_hold_a_mapping(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(
        "models:\n  base: fake\n  asked:\n    model_id: fake\n    prompt_template: '{question} a, b @ c=1'\n"
        "    chat_template_kwargs: {deep: false}\nengine: fake\n"
    )
    found = parse_args(BenchmarkConfig, ["--config", str(file)])
    asked = found.of(found.candidates()[1])
    assert asked.prompt_template == "{question} a, b @ c=1"
    assert asked.chat_template_kwargs == {"deep": False}
    assert found == build_config(BenchmarkConfig, {"models": found.models, "engine": "fake"})


def test_an_at_sign_that_begins_no_option_is_part_of_the_name() -> None:
    (found,) = BenchmarkConfig(models="a=/data@home/m@x.y@dtype=float32").candidates()
    assert (found.model_id, found.options) == ("/data@home/m@x.y", {"dtype": "float32"})


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("a=fake@num_rows=3", "a: 'num_rows' is no option of a single model; these are: attn_implementation"),
        ("a=fake@dataset_name=charts", "a: 'dataset_name' is no option of a single model"),
        ("a=fake@max_pixels=few", "a: --max_pixels must be a whole number, got 'few'"),
        ("a=fake@max_pixels=0", "a: --max_pixels must be at least 1, got 0"),
        ("a=fake@dtype=float32@dtype=bfloat16", "with an option given twice"),
        ("a=fake@engine=vllm@quantization=8bit", "a: --quantization is for --engine transformers and fake"),
        ("a=fake@response_regex=x@response_choices=y", "a: --response_regex is one form of answers"),
        ("a=fake+x@endpoint=http://h:1", "a: a server's models have one name each"),
        ("{}", "names none"),
        ('{"a": "fake"', "is no JSON object"),
        ({"a": 3}, "has 'a': 3; expected"),
        ({"a": {"model_id": "fake", "adapter": 3}}, "expected"),
        ('{"a": "fake", "a": "fake"}', "the name 'a' is given twice"),
    ],
)
def test_what_cannot_be_followed_is_refused(models: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"^--models") as refused:
        config(models, engine="auto")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_template": "no place"}, "--models b: --prompt_template"),
        ({"response_schema": "no.json"}, "--models b: --response_schema no.json: No such"),
    ],
)
def test_what_the_dataset_or_a_file_does_not_fit_names_the_model(
    options: dict[str, str], message: str, tmp_path: Path
) -> None:
    both = {"a": "fake", "b": {"model_id": "fake", **options}}
    with pytest.raises(ValueError, match=message):
        plan_benchmark(config(both, output_dir=str(tmp_path)))


def test_a_server_holds_models_that_are_loaded_alike(tmp_path: Path) -> None:
    both = {
        "base": "fake",
        "worded": {
            "model_id": "fake",
            "prompt_template": "{question}!",
            "temperature": 1.0,
            "max_new_tokens": 3,
        },
        "small": {"model_id": "fake", "max_pixels": 2000},
        "small too": {"model_id": "fake", "max_pixels": 2000, "top_p": 0.5},
        "elsewhere": {"model_id": "fake", "engine": "openai", "endpoint": "http://127.0.0.1:9"},
    }
    models = {name.replace(" ", "-"): said for name, said in both.items()}
    planned = plan_benchmark(config(models, output_dir=str(tmp_path)))
    assert servers(planned) == [["base", "worded"], ["small", "small-too"], ["elsewhere"]]
    assert planned.runs["elsewhere"].config.engine == "openai"
    assert planned.runs["worded"].task.prompt_template == "{question}!"
    assert planned.runs["base"].task.prompt_template == "{question}"
    assert planned.runs["small"].source is planned.runs["base"].source


def test_models_that_name_no_engine_have_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them cannot be loaded so by vLLM, which would be taken for the other."""
    monkeypatch.setattr(cluster, "find_gpu_objection", lambda package, log_level: None)

    def engines(models: str) -> list[str]:
        said = BenchmarkConfig(
            models=models, dataset_name=CHARTS, output_dir=str(tmp_path / "out"), overwrite=True
        )
        return [run.config.engine for run in plan_benchmark(said).runs.values()]

    with installed_vllm(tmp_path / "site"):
        assert engines("a=builtin,b=builtin") == ["vllm", "vllm"]
        assert engines("a=builtin,b=builtin@attn_implementation=sdpa") == ["transformers", "transformers"]
        assert engines("a=builtin@engine=vllm,b=builtin@engine=transformers") == ["vllm", "transformers"]
        with pytest.raises(
            ValueError, match=r"--models a: --max_model_len is for --engine vllm, .*@engine=vllm"
        ):
            engines("a=builtin@max_model_len=900,b=builtin@attn_implementation=sdpa")


def test_each_may_have_a_server_of_its_own(tmp_path: Path) -> None:
    quiet = Faults(latency_s=0)
    with FaultyServer(quiet).running() as one, FaultyServer(quiet).running() as two:
        models = f"one={MODEL}@endpoint={one.url},two={MODEL}@endpoint={two.url}/v1@max_new_tokens=3"
        said = BenchmarkConfig(models=models, dataset_name=CHARTS, speed_samples=0, output_dir=str(tmp_path))
        assert run_benchmark(plan_benchmark(said)).num_answered == 12
        limits = [[body["max_tokens"] for body in server.seen.bodies] for server in (one, two)]
    assert limits == [[64] * 6, [3] * 6]
    with pytest.raises(ValueError, match="--models one: --offline asks no server"):
        dataclasses.replace(said, offline=True)


WORDED = {
    "base": "fake",
    "worded": {"model_id": "fake", "prompt_template": "{question}, in @ word"},
    "short": {"model_id": "fake", "max_new_tokens": 1, "min_pixels": 1},
}


@pytest.mark.usefixtures("two_cpus")
def test_each_is_asked_as_it_says_and_only_once(tmp_path: Path) -> None:
    def run(folder: str, models: Any = WORDED, **options: Any) -> dict[str, Any]:
        said = config(models, output_dir=str(tmp_path / folder), **options)
        run_benchmark(plan_benchmark(said))
        return json.loads((tmp_path / folder / "results.json").read_text())

    def texts(folder: str) -> dict[tuple[str, str], str]:
        rows = pq.read_table(tmp_path / folder / "predictions.parquet").to_pylist()
        return {(row["model"], row["sample_id"]): row["prediction"] for row in rows}

    found = run("served", speed_samples=2, concurrency="1")
    assert {point["model"] for point in found["speed"]} == set(WORDED)
    assert found["models"]["short"] == "fake, max_new_tokens=1, min_pixels=1"
    assert found["prompt"]["prompt_template"] == "{question}"
    assert found["own_prompts"]["worded"]["prompt_template"] == "{question}, in @ word"
    by_model = {
        name: [text for (model, _), text in texts("served").items() if model == name] for name in WORDED
    }
    assert all(len(text.split()) == 1 for text in by_model["short"])
    assert all(one != other for one, other in zip(by_model["base"], by_model["worded"], strict=True))
    run("offline", offline=True)
    assert texts("offline") == texts("served")
    again = run("served", speed_samples=2, concurrency="1")
    assert again["speed"] == found["speed"]
    changed = WORDED | {"short": {"model_id": "fake", "max_new_tokens": 2, "min_pixels": 1}}
    with pytest.raises(ValueError, match="max_new_tokens was 1, now 2"):
        run("served", changed)
    with pytest.raises(
        ValueError, match=r"its prompt_template was '{question}, in @ word' and is '{question}'"
    ):
        run("third", "base=fake,worded=fake", baseline=str(tmp_path / "served" / "results.json"))
    baseline = {"base": "fake", "new": {"model_id": "fake", "prompt_template": "{question}?"}}
    run("fourth", baseline, baseline=str(tmp_path / "served" / "results.json"))
