"""Options of a server that is asked."""

from __future__ import annotations

import pytest

from vlmray.config import BenchmarkConfig, InferConfig, ServeConfig
from vlmray.errors import OptionError


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000", "https://api.example.com/v1", "http://[::1]:5/v1/", "http://host/prefix"]
)
def test_a_url_is_a_url(url: str) -> None:
    assert InferConfig(sample_slices="[:]", engine="openai", endpoint=url).endpoint == url
    assert BenchmarkConfig(models="a=b", endpoint=url).answering_engine == "openai"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"endpoint": "127.0.0.1:8000"}, "--endpoint must be the URL of a server"),
        ({"endpoint": "ftp://host"}, "--endpoint must be the URL of a server"),
        ({"endpoint": "http://host:port"}, "--endpoint must be the URL of a server"),
        ({"endpoint": "http://host/v1?key=x"}, "--endpoint must be the URL of a server"),
        ({"endpoint": "http://me:secret@host"}, "--endpoint holds a password"),
        ({}, "--engine openai asks a server; pass its URL as --endpoint"),
        ({"endpoint": "http://host", "max_in_flight": 0}, "--max_in_flight must be at least 1, got 0"),
        ({"endpoint": "http://host", "endpoint_timeout_s": 0.5}, "--endpoint_timeout_s must be at least 1"),
        (
            {"endpoint": "http://host", "image_transport": "url", "max_pixels": 9},
            "--image_transport url leaves images as they are; leave out --min_pixels and --max_pixels",
        ),
    ],
)
def test_mistakes_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError) as error_info:
        InferConfig(sample_slices="[:]", engine="openai", **options)  # type: ignore[arg-type]
    assert str(error_info.value).startswith(message)


def test_a_server_is_not_served() -> None:
    with pytest.raises(OptionError, match=r"^--engine openai asks a server, and is none"):
        ServeConfig(engine="openai")
