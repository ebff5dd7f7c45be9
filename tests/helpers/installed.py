"""A vLLM that is installed but cannot run: what choosing an engine looks at, and nothing else."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

_FILES = {
    "__init__.py": "",
    "model_executor/__init__.py": "",
    "model_executor/models.py": """
class ModelRegistry:
    @staticmethod
    def get_supported_archs():
        return {"Qwen2_5_VLForConditionalGeneration"}
""",
    "model_executor/layers/__init__.py": "",
    "model_executor/layers/quantization.py": "QUANTIZATION_METHODS = ['fp8', 'awq']",
}


@contextlib.contextmanager
def installed_vllm(folder: Path, *, name: str = "vllm", version: str = "0.32.1") -> Iterator[None]:
    """Let this process find a vLLM, written to a folder, for a while."""
    for path, text in _FILES.items():
        file = folder / "vllm" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    kept = {module: sys.modules.pop(module) for module in _imported()}
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for module in _imported():
            del sys.modules[module]
        sys.modules.update(kept)


def _imported() -> list[str]:
    return [each for each in sys.modules if each.split(".")[0] == "vllm"]
