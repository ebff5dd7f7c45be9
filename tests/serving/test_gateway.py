"""The gateway over real HTTP: what it takes, what it refuses and how. Answers come from a fake engine."""

from __future__ import annotations

import asyncio
import threading
from http.client import HTTPConnection
from typing import Any

import openai
import pytest

from helpers.gateways import KEY, MODEL, Backend, ask, data_uri, png, post, read_all, serving, wait_for
from vlmray.engines.fake import FakeEngine
from vlmray.schema import GenerationRequest


def test_the_client_is_answered(client: openai.OpenAI, backend: Backend) -> None:
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": data_uri(png())}},
            {"type": "text", "text": "How many?"},
        ]},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "And now?"},
    ]  # fmt: skip
    completion = client.chat.completions.create(
        model="chart", messages=messages, max_tokens=5, temperature=0.5, top_p=0.9, seed=-7, stop="x"
    )
    request = backend.requests[-1]
    assert completion.choices[0].message.content == FakeEngine().generate([request])[0].text
    assert completion.choices[0].finish_reason == "stop"
    assert completion.model == "chart"
    assert completion.usage is not None
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + 2
    assert request == GenerationRequest(
        request_id="chat", adapter="chart", images=[png()], stop=("x",), max_new_tokens=5, temperature=0.5,
        top_p=0.9, seed=-7,
        messages=[
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "3"}]},
            {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
        ],
    )  # fmt: skip


def test_defaults_are_greedy_and_bounded(client: openai.OpenAI, backend: Backend) -> None:
    client.chat.completions.create(**ask())
    request = backend.requests[-1]
    assert (request.temperature, request.top_p, request.max_new_tokens) == (0, 1, 512)
    assert request.adapter is None
    client.chat.completions.create(**ask(max_completion_tokens=1))
    assert backend.requests[-1].max_new_tokens == 1


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**ask("Which?")).choices[0].message.content
    chunks = list(
        client.chat.completions.create(**ask("Which?"), stream=True, stream_options={"include_usage": True})
    )
    deltas = [chunk.choices[0].delta.content for chunk in chunks[:-1]]
    assert "".join(delta for delta in deltas if delta) == whole
    assert len([delta for delta in deltas if delta]) == 2
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-2:] == [None, "stop"]
    assert not chunks[-1].choices
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2
    assert not any(chunk.usage for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_models_are_listed(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == [MODEL, "chart"]


def test_adapters_of_a_folder_are_listed_as_they_come(tmp_path: Any) -> None:
    with serving(Backend(), adapter_dir=str(tmp_path)) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        assert len(client.models.list().data) == 2
        for name, file in (
            ("late", "adapter_config.json"),
            (".hidden", "adapter_config.json"),
            ("other", "x.json"),
        ):
            (tmp_path / name).mkdir()
            (tmp_path / name / file).write_text("{}")
        assert [model.id for model in client.models.list()] == [MODEL, "chart", "late"]
        assert client.chat.completions.create(**{**ask(), "model": "late"}).model == "late"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**{**ask(), "model": "../late"})


def test_a_full_queue_is_a_503_that_says_when_to_come_back(url: str, backend: Backend) -> None:
    backend.busy = True
    try:
        status, answer, headers = post(url, ask())
    finally:
        backend.busy = False
    assert (status, headers["retry-after"]) == (503, "1")
    assert answer["error"]["message"] == "too many requests are waiting"


def test_a_stream_that_breaks_says_so_without_details(
    url: str, client: openai.OpenAI, backend: Backend
) -> None:
    backend.break_after = 1
    try:
        with pytest.raises(openai.APIError, match="the answer broke off"):
            list(client.chat.completions.create(**ask(), stream=True))
        backend.break_after = 0
        status, answer, _ = post(url, ask(stream=True))
        assert (status, answer["error"]["message"]) == (500, "the server failed; its log says why")
    finally:
        backend.break_after = None


def test_draining_answers_what_is_in_progress_and_refuses_the_rest() -> None:
    backend = Backend()
    backend.open.clear()
    with serving(backend) as (url, gateway):
        answers: list[int] = []
        threads = [
            threading.Thread(target=lambda body=body: answers.append(read_all(url, body)))
            for body in (ask(), ask(stream=True))
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(backend.requests) == 2)
        gateway.draining = True
        assert post(url, ask())[0] == 503
        backend.open.set()
        assert asyncio.run(gateway.drain(10)) == 0
        for thread in threads:
            thread.join()
        assert answers == [200, 200]


def test_a_prompt_too_long_is_told_with_both_numbers(client: openai.OpenAI, backend: Backend) -> None:
    backend.engine.max_model_len = 20
    try:
        with pytest.raises(
            openai.BadRequestError, match=r"maximum context length is 20 tokens, and the prompt has 501;"
        ) as refused:
            client.chat.completions.create(**ask("word " * 500))
        assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")
        cut = client.chat.completions.create(**ask("word " * 18)).choices[0]
        assert (cut.finish_reason, len((cut.message.content or "").split())) == ("length", 1)
    finally:
        backend.engine.max_model_len = None


def test_every_request_is_counted_by_what_became_of_it() -> None:
    backend = Backend()
    with serving(backend, max_body_bytes=2**20) as (url, gateway):
        wrong_key = {"Authorization": "Bearer x"}
        for body, headers in (
            (ask(), None), (ask(), wrong_key), (b"{", None), (b"x" * 2**21, None), (ask(top_k=-9), None),
            (ask(tools=[1]), None), ({**ask(), "model": "gpt"}, None), (b"{}", {"Content-Encoding": "gzip"}),
        ):  # fmt: skip
            post(url, body, headers)
        backend.busy = True
        post(url, ask())
        backend.busy, backend.break_after = False, 0
        post(url, ask(stream=True))
        backend.break_after = 1
        read_all(url, ask(stream=True))
        connection = HTTPConnection(url.removeprefix("http://"), timeout=20)
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("Authorization", f"Bearer {KEY}")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b"{")
        connection.close()  # before its body has come

        def counted() -> dict[tuple[str, str], float]:
            samples = next(iter(gateway.metrics.requests.collect())).samples
            return {
                (each.labels["model"], each.labels["status"]): each.value
                for each in samples
                if each.name.endswith("_total")
            }

        wait_for(lambda: ("", "499") in counted())
    assert counted() == {
        ("fake", "200"): 1, ("", "401"): 1, ("", "400"): 3, ("", "413"): 1, ("", "404"): 1, ("", "415"): 1,
        ("fake", "503"): 1, ("fake", "500"): 2, ("", "499"): 1,
    }  # fmt: skip


def test_metrics_count_what_happened() -> None:
    with serving(Backend(), key=None) as (url, _):
        for body in (ask(), ask(stream=True), ask(model="chart"), ask(model="x" * 9), ask(max_tokens=-1)):
            read_all(url, body)
        connection = HTTPConnection(url.removeprefix("http://"), timeout=20)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
    assert 'vlmray_requests_total{model="fake",status="200"} 2.0' in text
    assert 'vlmray_requests_total{model="chart",status="200"} 1.0' in text
    assert 'vlmray_requests_total{model="",status="404"} 1.0' in text
    assert 'vlmray_completion_tokens_total{model="fake"} 4.0' in text
    assert 'vlmray_time_to_first_token_seconds_count{model="fake"} 1.0' in text
    assert 'vlmray_batch_size_bucket{le="1.0",model="chart"} 1.0' in text
    assert "vlmray_requests_in_flight 0.0" in text
    assert "xxxxxxxxx" not in text
