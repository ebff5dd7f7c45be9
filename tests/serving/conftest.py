"""A gateway without Ray, and its client."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from helpers.gateways import KEY, Backend, serving


@pytest.fixture(scope="module")
def backend() -> Backend:
    return Backend()


@pytest.fixture(scope="module")
def url(backend: Backend) -> Iterator[str]:
    with serving(backend, max_body_bytes=2**20, max_images=3, image_timeout_s=1.0) as (url, _):
        yield url


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
