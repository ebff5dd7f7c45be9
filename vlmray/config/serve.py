"""Options of the job that serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlmray.config.common import ModelConfig, check_at_least, check_not_empty, parse_replica_range
from vlmray.errors import OptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig(ModelConfig):
    """Serve a vision-language model and adapters behind an OpenAI-compatible endpoint on Ray Serve."""

    served_model_name: str | None = None
    """Name that clients ask the base model by; default: --model_id."""

    adapters: str | None = None
    """Adapters beside the base: 'name=folder,other=s3://bucket/folder'. Clients ask one by its name."""

    adapter_dir: str | None = None
    """Folder or URI whose subfolders are adapters too, each loaded when it is first asked."""

    max_adapters: int = 8
    """Adapters that a replica holds at a time; those not asked for longest make room."""

    engine: Literal["transformers", "fake"] = "transformers"
    """What generates: transformers, or a scripted stand-in for tests."""

    host: str = "127.0.0.1"
    """Address to listen on. Others than loopback need an API key, in the environment variable
    VLMRAY_API_KEY."""

    port: int = 8000
    """Port to listen on."""

    num_replicas: str | None = None
    """Model replicas: N, or MIN,MAX to scale with the load, MIN from 0; default: one per GPU, or one without
    GPUs."""

    gpus_per_replica: float | None = None
    """GPUs of each replica (0.5: half of one, memory too); default: 1 where the cluster has GPUs, else 0."""

    target_ongoing_requests: int | None = None
    """Requests per replica at which more replicas are started; default: --max_batch_size."""

    upscale_delay_s: float = 10.0
    """Start replicas once the load has called for them this long."""

    downscale_delay_s: float = 300.0
    """Stop replicas once the load has not needed them this long."""

    max_batch_size: int = 16
    """Requests that share a forward pass, at most."""

    max_batch_tokens: int | None = None
    """Prompt tokens per forward pass, at most, padding included; default: what the memory of a GPU holds,
    16384 on a CPU. Halved and remembered when memory runs out."""

    batch_wait_timeout_s: float = 0.01
    """Wait this long for more requests to share a forward pass; where batches take long, up to a twentieth of
    that for as many requests as the last one had."""

    stream_interval_s: float = 0.05
    """Send the text of a stream in pieces this far apart, the first at once; 0: every token by itself."""

    max_queued_requests: int = 256
    """Requests that may wait for a replica; more are answered 503."""

    max_new_tokens: int = 512
    """Tokens of an answer where the client sets no limit."""

    max_new_tokens_limit: int = 4096
    """Largest limit that a client may set."""

    max_prompt_chars: int = 200_000
    """Characters of all texts of a request, at most."""

    max_images: int = 8
    """Images of a request, at most."""

    max_image_pixels: int = 16_000_000
    """Width x height of an image, at most."""

    max_body_bytes: int = 33_554_432
    """Size of a request and of each image it names by URL, at most."""

    image_timeout_s: float = 10.0
    """Time to fetch an image by URL, redirects included."""

    allow_private_image_urls: bool = False
    """Fetch images from loopback, private and link-local addresses too. Only where clients are trusted."""

    drain_timeout_s: float = 60.0
    """Time for requests in progress when the server is told to stop."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "WARNING"
    """Verbosity of the log."""

    def __post_init__(self) -> None:
        check_not_empty(self)
        ModelConfig.__post_init__(self)
        check_at_least(
            self, 1, "max_adapters", "target_ongoing_requests", "max_batch_size", "max_batch_tokens",
            "max_new_tokens", "max_new_tokens_limit", "max_prompt_chars", "max_image_pixels",
            "max_body_bytes",
        )  # fmt: skip
        check_at_least(
            self, 0, "port", "gpus_per_replica", "upscale_delay_s", "downscale_delay_s",
            "batch_wait_timeout_s", "stream_interval_s", "max_queued_requests", "max_images",
            "image_timeout_s", "drain_timeout_s",
        )  # fmt: skip
        if self.max_new_tokens > self.max_new_tokens_limit:
            raise OptionError(
                "max_new_tokens",
                f"{self.max_new_tokens} is above --max_new_tokens_limit {self.max_new_tokens_limit}",
            )
        self.replica_range()
        self.adapter_paths()

    @property
    def base_name(self) -> str:
        """Name that clients ask the base model by."""
        return self.served_model_name or self.model_id

    def replica_range(self) -> tuple[int, int] | None:
        """Return the smallest and largest number of replicas, or None where the cluster decides."""
        return parse_replica_range(self.num_replicas, least=0)

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
