"""Options of the job that serves."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from vlmray.config.common import ModelConfig, ReplicaConfig, WaitingConfig, check_at_least, check_verifies
from vlmray.config.marks import option
from vlmray.errors import OptionError

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s,]+")


@dataclass(frozen=True, kw_only=True)
class ServeConfig(WaitingConfig, ReplicaConfig, ModelConfig):
    """Serve a vision-language model and adapters behind an OpenAI-compatible endpoint on Ray Serve."""

    least_replicas: ClassVar[int] = 0

    served_model_name: str | None = option(None, affects="run")
    """Name that clients ask the base model by; default: --model_id."""

    adapters: str | None = option(None, affects="result")
    """Adapters beside the base: 'name=folder,other=s3://bucket/folder'. Clients ask one by its name."""

    adapter_dir: str | None = option(None, affects="result")
    """Folder or URI whose subfolders are adapters too, each loaded when it is first asked."""

    max_adapters: int = option(8, affects="speed")
    """Adapters that a replica holds at a time; those not asked for longest make room."""

    host: str = option("127.0.0.1", affects="run")
    """Address to listen on. Others than loopback need an API key, in the environment variable
    VLMRAY_API_KEY."""

    port: int = option(8000, affects="run")
    """Port to listen on."""

    replace: bool = option(False, affects="run")
    """Stop the server that the cluster has already, if it has one, and take its place."""

    allowed_origins: str | None = option(None, affects="run")
    """Pages that may ask from a browser: 'https://app.example.com,http://localhost:3000', or '*' for all;
    default: only the server's own."""

    target_ongoing_requests: int | None = option(None, affects="speed")
    """Requests per replica at which more replicas are started; default: --max_batch_size, 64 with vLLM."""

    upscale_delay_s: float = option(10.0, affects="speed")
    """Start replicas once the load has called for them this long."""

    downscale_delay_s: float = option(300.0, affects="speed")
    """Stop replicas once the load has not needed them this long."""

    max_batch_size: int = option(16, affects="speed", engines=("transformers", "fake"))
    """Requests that share a forward pass, at most; that of vLLM is max_num_seqs of --engine_options."""

    batch_wait_timeout_s: float = option(0.01, affects="speed", engines=("transformers", "fake"))
    """Wait this long for more requests to share a forward pass; where batches take long, up to a twentieth of
    that for as many requests as the last one had."""

    stream_interval_s: float = option(0.05, affects="speed")
    """Send the text of a stream in pieces this far apart, the first at once; 0: every token by itself."""

    max_queued_requests: int = option(256, affects="run")
    """Requests that may wait for a replica, at each gateway; more are answered 503."""

    startup_timeout_s: float = option(300.0, affects="run")
    """Time that a request waits for a replica to start where none runs; then it is answered 503."""

    max_new_tokens: int = option(512, affects="result")
    """Tokens of an answer where the client sets no limit."""

    max_new_tokens_limit: int = option(4096, affects="run")
    """Largest limit that a client may set."""

    max_prompt_chars: int = option(200_000, affects="run")
    """Characters of all texts of a request, at most."""

    max_images: int = option(8, affects="run")
    """Images of a request, at most."""

    max_image_pixels: int = option(16_000_000, affects="run")
    """Width x height of an image, at most."""

    max_body_bytes: int = option(33_554_432, affects="run")
    """Size of a request and of each image it names by URL, at most."""

    image_timeout_s: float = option(10.0, affects="run")
    """Time to fetch an image by URL, redirects included."""

    allow_private_image_urls: bool = option(False, affects="run")
    """Fetch images from loopback, private and link-local addresses too. Only where clients are trusted."""

    drain_timeout_s: float = option(60.0, affects="run")
    """Time for requests in progress when the server is told to stop."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = option("WARNING", affects="run")
    """Verbosity of the log."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(
            self, 1, "max_adapters", "target_ongoing_requests", "max_batch_size",
            "max_new_tokens", "max_new_tokens_limit", "max_prompt_chars", "max_image_pixels",
            "max_body_bytes",
        )  # fmt: skip
        check_at_least(
            self, 0, "port", "upscale_delay_s", "downscale_delay_s",
            "batch_wait_timeout_s", "stream_interval_s", "max_queued_requests", "max_images",
            "startup_timeout_s", "image_timeout_s", "drain_timeout_s",
        )  # fmt: skip
        if self.engine == "openai":
            raise OptionError("engine", "openai asks a server, and is none", "let clients ask that one")
        if self.max_new_tokens > self.max_new_tokens_limit:
            raise OptionError(
                "max_new_tokens",
                f"{self.max_new_tokens} is above --max_new_tokens_limit {self.max_new_tokens_limit}",
            )
        has_adapters = bool(self.adapter_paths() or self.adapter_dir)
        check_verifies(self, has_adapters=has_adapters, hint="pass --adapters or --adapter_dir")
        self.origins()

    @property
    def base_name(self) -> str:
        """Name that clients ask the base model by."""
        return self.served_model_name or self.model_id

    def adapter_paths(self) -> dict[str, str]:
        """Return folder or URI of each adapter given by name."""
        found: dict[str, str] = {}
        for entry in (self.adapters or "").split(",") if self.adapters else []:
            name, _, path = (part.strip() for part in entry.partition("="))
            if not name or not path:
                raise OptionError(
                    "adapters", f"has {entry!r}", "expected name=folder, with commas between them"
                )
            if name in found or name == self.base_name:
                raise OptionError("adapters", f": the name {name!r} is given twice")
            found[name] = path
        return found

    def origins(self) -> list[str]:
        """Return the origins whose pages may ask."""
        found = [entry.strip() for entry in (self.allowed_origins or "").split(",") if entry.strip()]
        for entry in found:
            if entry != "*" and not _ORIGIN.fullmatch(entry):
                raise OptionError(
                    "allowed_origins",
                    f"has {entry!r}",
                    "expected scheme://host or scheme://host:port without a path, with commas between them",
                )
        return found
