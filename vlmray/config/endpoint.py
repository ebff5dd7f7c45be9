"""Options of a server that is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from vlmray.config.common import EngineConfig, check_at_least
from vlmray.config.marks import narrow_engines, option
from vlmray.errors import OptionError

_OPENAI = ("openai",)


@dataclass(frozen=True, kw_only=True)
class EndpointConfig(EngineConfig):
    """Which server answers, and how much it is asked at a time."""

    endpoint: str | None = option(None, affects="result", engines=_OPENAI)
    """Ask the OpenAI-compatible server at this URL instead of loading a model or starting a server. Its key:
    the environment variable VLMRAY_API_KEY."""

    max_in_flight: int | None = option(None, affects="speed", engines=_OPENAI)
    """Requests in flight at the server, at most, of all jobs of the cluster together; it begins with a few
    and finds out what the server takes. Default: 256, of a benchmark the largest --concurrency."""

    endpoint_timeout_s: float = option(600.0, affects="run", engines=_OPENAI)
    """Seconds that the server may say nothing at all, and take for one answer; one that says that it has too
    much to do is waited for as long as it takes."""

    image_transport: Literal["data", "url"] = option("data", affects="run", engines=_OPENAI)
    """data: images travel with the question; url: those that are http(s) URLs are fetched by the server."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "max_in_flight", "endpoint_timeout_s")
        if self.engine == "openai" and self.endpoint is None:
            raise OptionError("engine", "openai asks a server", "pass its URL as --endpoint")
        if self.endpoint is not None:
            _check_url(self.endpoint)
        if self.image_transport == "url" and (self.min_pixels or self.max_pixels):
            raise OptionError(
                "image_transport",
                "url leaves images as they are",
                "leave out --min_pixels and --max_pixels",
            )

    def possible_engines(self) -> tuple[tuple[str, ...], str | None]:
        """Return what `auto` has to choose from: a server where one is named, and only there.

        Raises:
            OptionError: Two options leave nothing, or one is of a server that is not named.
        """
        left, decisive = narrow_engines(self, ("transformers", "vllm", "openai"))
        if left == _OPENAI and self.endpoint is None:
            raise OptionError(str(decisive), "is for --engine openai", "pass the server's URL as --endpoint")
        return (left if self.endpoint else tuple(each for each in left if each != "openai")), decisive


def _check_url(text: str) -> None:
    try:
        url = urlsplit(text)
        is_url = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        is_url = False
    if not is_url or url.query or url.fragment:
        raise OptionError("endpoint", f"must be the URL of a server, http(s)://HOST:PORT, got {text!r}")
    if url.username or url.password:
        raise OptionError("endpoint", "holds a password, which would be written down", "set VLMRAY_API_KEY")
