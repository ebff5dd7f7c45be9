"""`load_engine`: the only place that picks a backend. Importing this package loads no model library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlmray.config import EndpointConfig, EngineConfig
from vlmray.engines.base import Engine
from vlmray.errors import OptionError
from vlmray.models.source import resolve_model_id

if TYPE_CHECKING:
    from vlmray.engines.openai.shares import Keeper

__all__ = ["ENGINES", "Engine", "build_engine", "calls_at_once", "check_engine", "load_engine"]

ENGINES = ("transformers", "vllm", "openai", "fake")
"""Known values of `--engine`."""

_CALLS_AT_ONCE = {"vllm": 256, "openai": 6}
"""Of engines that mix the requests of several calls, so that the end of one does not idle the model."""


def calls_at_once(engine: str) -> int:
    """Return how many threads may be in `generate` of an engine at a time."""
    return _CALLS_AT_ONCE.get(engine, 1)


def check_engine(config: EngineConfig, model_id: str = "", adapters: Sequence[str] = ()) -> None:
    """Check on a job's driver that an engine is there, and takes its options and a model's adapters.

    Raises:
        OptionError: It is not, or does not.
    """
    if config.engine == "vllm":
        from vlmray.engines.vllm.adapters import check_kind
        from vlmray.engines.vllm.options import check_options

        check_options(config)
        for adapter in adapters:
            check_kind(adapter, model_id)


def build_engine(
    *,
    engine: str,
    model_id: str,
    adapter: str | None = None,
    batch_size: int = 16,
    num_threads: int | None = None,
    memory_fraction: float = 1.0,
    adapters: Sequence[str] = (),
    max_adapters: int = 0,
    **options: Any,
) -> Engine:
    """Load a model and make the engine that answers with it: `load_engine` by keywords.

    Args:
        engine: One of `ENGINES`.
        model_id: `builtin`, a local checkpoint folder or a hub id (`vlmray.builtin` has the names); for the
            fake engine a `fake?name=value&...` id, see `vlmray.engines.fake.FakeEngine`; for a server the
            name by which it knows the model.
        adapter: Folder of a LoRA adapter. It answers every request that names no adapter, so the bare
            base cannot be asked through this engine; to ask both, build the engine without `adapter`
            and call `TransformersEngine.load_adapter`.
        batch_size: Most rows in one forward pass.
        num_threads: CPU threads of torch in this process; None leaves torch's own choice.
        memory_fraction: Share of the GPU's memory that this process may take.
        adapters: Folders of adapters that `load_adapter` will be asked for, as far as they are known: vLLM
            makes room for the largest of them when it starts, and `verify_adapter` is about them.
        max_adapters: The most that will be loaded at a time, for vLLM again.
        **options: The other options of `vlmray.config.EndpointConfig`, with its defaults: `quantization`,
            `dtype`, `attn_implementation`, `max_batch_tokens`, `min_pixels`, `max_pixels`,
            `trust_remote_code`, those of vLLM, and of a server `endpoint`, `max_in_flight`,
            `endpoint_timeout_s`.

    Raises:
        ValueError: Unknown engine, unusable model or adapter.
        FileNotFoundError: A local model or adapter folder that is not there or lacks files.
    """
    config: Any = {"engine": engine, **options}
    return load_engine(
        model_id,
        EndpointConfig(**config),
        adapter=adapter,
        batch_size=batch_size,
        num_threads=num_threads,
        memory_fraction=memory_fraction,
        adapters=adapters,
        max_adapters=max_adapters,
    )


def load_engine(
    model_id: str,
    config: EngineConfig,
    *,
    adapter: str | None = None,
    batch_size: int = 16,
    num_threads: int | None = None,
    memory_fraction: float = 1.0,
    adapters: Sequence[str] = (),
    max_adapters: int = 0,
    keeper: Keeper | None = None,
    key: str | None = None,
) -> Engine:
    """Load a model and make the engine that answers with it; `build_engine` says more of the arguments.

    Args:
        model_id: As there.
        config: As there.
        adapter: As there.
        batch_size: As there.
        num_threads: As there.
        memory_fraction: As there.
        adapters: As there.
        max_adapters: As there.
        keeper: Has the limit of what may be in flight at a server; None: this engine alone.
        key: Key to send to a server; None: that of the environment.
    """
    if config.engine == "fake":
        from vlmray.engines.fake import FakeEngine

        return FakeEngine.from_model_id(model_id)
    if isinstance(config, EndpointConfig) and config.engine == "openai":
        from vlmray.engines.openai.engine import OpenAIEngine

        return OpenAIEngine.of(model_id, config, keeper, key)
    if config.engine == "transformers":
        from vlmray.engines.transformers.engine import TransformersEngine

        return TransformersEngine.from_pretrained(
            resolve_model_id(model_id),
            config,
            adapter=adapter,
            batch_size=batch_size,
            num_threads=num_threads,
            memory_fraction=memory_fraction,
            adapters=adapters,
        )
    if config.engine == "vllm":
        check_engine(config)  # first, as what follows imports vLLM
        from vlmray.engines.vllm.engine import VLLMEngine

        return VLLMEngine.from_pretrained(
            resolve_model_id(model_id),
            config,
            adapter=adapter,
            num_threads=num_threads,
            memory_fraction=memory_fraction,
            adapters=adapters,
            max_adapters=max_adapters,
        )
    raise OptionError("engine", f": unknown engine {config.engine!r}", f"known: {', '.join(ENGINES)}")
