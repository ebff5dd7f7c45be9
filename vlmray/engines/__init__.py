"""`build_engine`: the only place that picks a backend. Importing this package loads no model library."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from vlmray.checkpoints import cache_folder
from vlmray.engines.base import Engine

__all__ = ["ENGINES", "TINY_RANDOM", "Engine", "build_engine", "resolve_model_id"]

ENGINES = ("transformers", "fake")
"""Known values of `--engine`."""

TINY_RANDOM = "tiny-random"
"""The model id of the built-in random model: no download, answers without meaning, the real code path."""

_TINY_RANDOM_BUILD = "v2"  # part of the folder's name: raise it whenever the built files change


def build_engine(
    *,
    engine: str,
    model_id: str,
    adapter: str | None = None,
    quantization: str = "none",
    dtype: str = "auto",
    batch_size: int = 16,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    num_threads: int | None = None,
    trust_remote_code: bool = False,
) -> Engine:
    """Load a model and make the engine that answers with it.

    Args:
        engine: One of `ENGINES`.
        model_id: `tiny-random`, a local checkpoint folder or a hub id; for the fake engine a
            `fake?name=value&...` id, see `vlmray.testing.FakeEngine`.
        adapter: Folder of a LoRA adapter. It answers every request that names no adapter, so the bare
            base cannot be asked through this engine; to ask both, build the engine without `adapter`
            and call `TransformersEngine.load_adapter`.
        quantization: `none`, `8bit` or `4bit`.
        dtype: `auto` (the checkpoint's on a GPU, float32 on a CPU), `float32`, `bfloat16` or `float16`.
        batch_size: Most rows in one forward pass.
        min_pixels: Images are enlarged to at least this many pixels; None keeps the checkpoint's value.
        max_pixels: Images are shrunk to at most this many pixels; None keeps the checkpoint's value.
        num_threads: CPU threads of torch in this process; None leaves torch's own choice.
        trust_remote_code: Run model code that comes with the checkpoint.

    Raises:
        ValueError: Unknown engine, unusable model or adapter.
        FileNotFoundError: A local model or adapter folder that is not there or lacks files.
    """
    if engine == "fake":
        from vlmray.testing import FakeEngine

        return FakeEngine.from_model_id(model_id)
    if engine == "transformers":
        from vlmray.engines.transformers import TransformersEngine

        return TransformersEngine.from_pretrained(
            resolve_model_id(model_id),
            adapter=adapter,
            quantization=quantization,
            dtype=dtype,
            batch_size=batch_size,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            num_threads=num_threads,
            trust_remote_code=trust_remote_code,
        )
    raise ValueError(f"unknown engine {engine!r} for --engine; known: {', '.join(ENGINES)}")


def resolve_model_id(model_id: str) -> str:
    """Return the folder of the built-in model for `tiny-random`, and any other id unchanged.

    The folder is built on first use under `$VLMRAY_CACHE`, or `~/.cache/vlmray`. It appears by one
    rename, so processes that start together may all ask for it.
    """
    if model_id != TINY_RANDOM:
        return model_id
    folder = cache_folder() / f"{TINY_RANDOM}-{_TINY_RANDOM_BUILD}"
    if not folder.is_dir():
        _build_atomically(folder)
    return str(folder)


def _build_atomically(folder: Path) -> None:
    from vlmray.testing import build_tiny_random_model

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        build_tiny_random_model(scratch)
        scratch.chmod(0o755)  # mkdtemp makes folders that only their owner reads
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster, with the same bytes
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
