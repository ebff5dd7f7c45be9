"""OpenAI's batch files: a line out for each line in, in order, whatever is wrong with some of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from helpers.batches import BROKEN, NUM_REQUESTS, body_of, check_output, line_of, write_batch
from helpers.rows import make_image
from vlmray.benchmark.plan import plan_benchmark
from vlmray.config import BenchmarkConfig, FinetuneConfig, InferConfig
from vlmray.dataset.rows import read_rows
from vlmray.dataset.selection import describe_columns
from vlmray.engines.fake import FakeEngine
from vlmray.errors import OptionError
from vlmray.finetune.plan import open_training_data
from vlmray.inference import stages
from vlmray.inference.job import run_inference
from vlmray.inference.plan import InferenceRun, plan_inference
from vlmray.inference.requests.output import write_output
from vlmray.schema import GenerationRequest


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    return write_batch(tmp_path / "batch.jsonl")


def _plan(path: Path, **options: Any) -> InferenceRun:
    fake = {"engine": "fake", "model_id": "fake", "sample_slices": "[:]"}
    config = InferConfig(
        **{**fake, "output_dir": str(path.parent / "out"), **options}, dataset_name=str(path)
    )
    return plan_inference(config)


def _answer(run: InferenceRun, num_rows: int) -> None:
    """Answer and write the first pending rows, as a run that ends there."""
    rows = read_rows(run.source, run.spec, run.config.dataset_split, run.pending[:num_rows])
    rows = stages.generate_rows(stages.prepare_rows(rows, run.task), FakeEngine(), run.task)
    stages.save_rows([stages.score_row(row, run.task) for row in rows], run.folder)


def test_a_run_that_died_leaves_a_line_for_each_request(batch: Path) -> None:
    run = _plan(batch)
    line = describe_columns(run.source, run.spec)
    assert line.startswith("request from 'body'; ")
    _answer(run, 95)
    resumed = _plan(batch)
    tried_again = sum(number < 95 for number in BROKEN)
    assert len(resumed.pending) == NUM_REQUESTS - 95 + tried_again
    _answer(resumed, NUM_REQUESTS)
    write_output(resumed)
    texts = check_output(batch.parent / "out" / "batch_output.jsonl")
    assert all(texts)
    assert len(set(texts)) == len(texts)


def test_a_job_writes_the_lines_at_its_end_and_overwriting_takes_them_away(tmp_path: Path) -> None:
    path = tmp_path / "batch.jsonl"
    path.write_text("\n".join(json.dumps(line_of(number)) for number in range(6)), encoding="utf-8")
    _answer(_plan(path, sample_slices="[1:4]"), 3)
    output = tmp_path / "out" / "batch_output.jsonl"
    assert run_inference(_plan(path, sample_slices="[1:4]")).num_answered == 3
    assert [json.loads(line)["custom_id"] for line in output.open()] == ["id-1", "id-2", "id-3"]
    _answer(_plan(path), 3)
    assert run_inference(_plan(path)).num_resumed == 6
    assert [json.loads(line)["custom_id"] for line in output.open()] == [f"id-{n}" for n in range(6)]
    _plan(path, overwrite=True)
    assert not output.exists()


def test_a_request_that_asks_how_likely_tokens_were_is_told(tmp_path: Path) -> None:
    path = tmp_path / "batch.jsonl"
    wanted: list[dict[str, Any]] = [{"logprobs": True, "top_logprobs": 2}, {"logprobs": True}, {}]
    bodies = [body_of(number, **fields) for number, fields in enumerate(wanted)]
    path.write_text("\n".join(json.dumps(line_of(n, body=body)) for n, body in enumerate(bodies)))
    run = _plan(path)
    _answer(run, 3)
    write_output(run)
    lines = [json.loads(line) for line in (tmp_path / "out" / "batch_output.jsonl").open()]
    choices = [ChatCompletion.model_validate(line["response"]["body"]).choices[0] for line in lines]
    for choice, num_likeliest in zip(choices[:2], (2, 0), strict=True):
        assert choice.logprobs is not None
        content = choice.logprobs.content or []
        assert b"".join(bytes(each.bytes or ()) for each in content).decode() == choice.message.content
        assert {len(each.top_logprobs) for each in content} == {num_likeliest}
    assert choices[2].logprobs is None
    assert all(row["confidence"] for row in run.folder.rows(["confidence"]))


def _request(path: Path, body: dict[str, Any], **options: Any) -> GenerationRequest:
    path.write_text(json.dumps(line_of(0, body=body)), encoding="utf-8")
    run = _plan(path, **options)
    rows = stages.prepare_rows(read_rows(run.source, run.spec, "test", [0]), run.task)
    assert rows[0]["error"] is None
    return stages.make_requests(rows, run.task)[0]


def test_what_a_request_says_of_its_answer_counts(tmp_path: Path) -> None:
    said = {
        "max_tokens": 7, "temperature": 0.5, "seed": 11, "stop": ["a", "b"], "top_k": -1,
        "chat_template_kwargs": {"n": 3, "own": "1"}, "min_tokens": 2,
    }  # fmt: skip
    path = tmp_path / "batch.jsonl"
    options: dict[str, Any] = {
        "max_new_tokens": 99, "seed": 5, "temperature": 0.1, "chat_template_kwargs": {"n": 1, "all": True},
        "system_prompt": "Be brief.",
    }  # fmt: skip
    request = _request(path, body_of(2, **said), **options)
    assert (request.max_new_tokens, request.temperature, request.seed) == (7, 0.5, 11)
    assert (request.stop, request.top_k, request.min_new_tokens) == (("a", "b"), 0, 2)
    assert request.chat_template_kwargs == {"n": 3, "own": "1", "all": True}
    assert [message["role"] for message in request.messages] == ["system", "user"]
    assert request.images == [make_image(2)] * 2
    plain = _request(path, body_of(2), **options)
    assert (plain.max_new_tokens, plain.temperature, plain.seed) == (99, 0.1, 5)


def test_requests_have_forms_of_their_own_and_calls_are_written_as_calls(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    function = {"name": "add", "parameters": schema}
    fields: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"tools": [{"type": "function", "function": function}], "tool_choice": "required"},
        {},
    ]
    path = tmp_path / "batch.jsonl"
    lines = [line_of(number, body=body_of(number, **each)) for number, each in enumerate(fields)]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    run = _plan(path, response_regex="[a-z]{3}")
    _answer(run, 4)
    write_output(run)
    bodies = [json.loads(line)["response"]["body"] for line in (tmp_path / "out/batch_output.jsonl").open()]
    (formed, chosen, called, plain) = (body["choices"][0] for body in bodies)
    assert json.loads(formed["message"]["content"]) == {"a": 0}
    assert chosen["message"]["content"] in ("yes", "no")
    assert (called["message"]["content"], called["finish_reason"]) == (None, "tool_calls")
    assert called["message"]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": -0}'}
    assert len(plain["message"]["content"]) == 3  # as the option has it
    rows = run.folder.rows(["parsed", "keeps_form"])
    assert [row["keeps_form"] for row in rows] == [True] * 4
    assert [row["parsed"] is not None for row in rows] == [True, False, True, False]


def test_a_request_asks_for_the_base_or_the_adapter(tmp_path: Path) -> None:
    path = tmp_path / "batch.jsonl"
    for name, adapter in (("fake", None), ("mine", "adapter"), ("runs/mine", "adapter")):
        assert _request(path, body_of(1, model=name), adapter="runs/mine").adapter == adapter
    assert _request(path, body_of(1)).adapter is None


def test_images_are_data_or_urls(tmp_path: Path) -> None:
    path = tmp_path / "batch.jsonl"
    part = {"type": "image_url", "image_url": {"url": "/etc/hostname"}}
    path.write_text(
        json.dumps(line_of(0, body={**body_of(0), "messages": [{"role": "user", "content": [part]}]}))
    )
    run = _plan(path)
    (row,) = read_rows(run.source, run.spec, "test", [0])
    assert row["error"] == "messages[0].content[0].image_url.url is neither a data URI nor an http(s) URL"


def test_other_jobs_refuse_a_batch(batch: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--dataset_name holds batch requests, which vlmray infer answers"):
        open_training_data(FinetuneConfig(dataset_name=str(batch), model_id="tiny-random"))
    config = BenchmarkConfig(
        dataset_name=str(batch), sample_slices="[:]", engine="fake", models="a=fake", output_dir=str(tmp_path)
    )
    with pytest.raises(OptionError, match="--dataset_name holds batch requests, which vlmray infer answers"):
        plan_benchmark(config)
