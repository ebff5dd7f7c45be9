"""`build_engine`: the only place that picks a backend. Importing this package loads no model library."""

from __future__ import annotations

from vlmray.engines.base import Engine
from vlmray.models.source import resolve_model_id

__all__ = ["ENGINES", "Engine", "build_engine"]

ENGINES = ("transformers", "fake")
"""Known values of `--engine`."""


def build_engine(
    *,
    engine: str,
    model_id: str,
    adapter: str | None = None,
    quantization: str = "none",
    dtype: str = "auto",
    attn_implementation: str | None = None,
    batch_size: int = 16,
    max_batch_tokens: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    num_threads: int | None = None,
    memory_fraction: float = 1.0,
    trust_remote_code: bool = False,
) -> Engine:
    """Load a model and make the engine that answers with it.

    Args:
        engine: One of `ENGINES`.
        model_id: `builtin`, a local checkpoint folder or a hub id (`vlmray.builtin` has the names); for the
            fake engine a `fake?name=value&...` id, see `vlmray.engines.fake.FakeEngine`.
        adapter: Folder of a LoRA adapter. It answers every request that names no adapter, so the bare
            base cannot be asked through this engine; to ask both, build the engine without `adapter`
            and call `TransformersEngine.load_adapter`.
        quantization: `none`, `8bit` or `4bit`.
        dtype: `auto` (the checkpoint's on a GPU, float32 on a CPU), `float32`, `bfloat16` or `float16`.
        attn_implementation: Attention kernel; None lets transformers choose.
        batch_size: Most rows in one forward pass.
        max_batch_tokens: Most prompt tokens in one, padding included; None: what the memory holds.
        min_pixels: Images are enlarged to at least this many pixels; None keeps the checkpoint's value.
        max_pixels: Images are shrunk to at most this many pixels; None keeps the checkpoint's value.
        num_threads: CPU threads of torch in this process; None leaves torch's own choice.
        memory_fraction: Share of the GPU's memory that this process may take.
        trust_remote_code: Run model code that comes with the checkpoint.

    Raises:
        ValueError: Unknown engine, unusable model or adapter.
        FileNotFoundError: A local model or adapter folder that is not there or lacks files.
    """
    if engine == "fake":
        from vlmray.engines.fake import FakeEngine

        return FakeEngine.from_model_id(model_id)
    if engine == "transformers":
        from vlmray.engines.transformers.engine import TransformersEngine

        return TransformersEngine.from_pretrained(
            resolve_model_id(model_id),
            adapter=adapter,
            quantization=quantization,
            dtype=dtype,
            attn_implementation=attn_implementation,
            batch_size=batch_size,
            max_batch_tokens=max_batch_tokens,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            num_threads=num_threads,
            memory_fraction=memory_fraction,
            trust_remote_code=trust_remote_code,
        )
    raise ValueError(f"unknown engine {engine!r} for --engine; known: {', '.join(ENGINES)}")
