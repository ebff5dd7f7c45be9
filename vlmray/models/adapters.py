"""Put LoRA adapters on a loaded model and take them off again."""

from __future__ import annotations

import warnings
from typing import Any

from vlmray.errors import OptionError, one_line


def attach_adapter(model: Any, adapter: str, *, name: str) -> Any:
    """Load a LoRA adapter into a model under a name, and refuse one that would not take full effect.

    Args:
        model: The base, or a `PeftModel` that already has other adapters.
        adapter: Folder with `adapter_config.json` and `adapter_model.safetensors`.
        name: The adapter's name in the model; letters, digits and underscores.

    Returns:
        The `PeftModel`: the same object if `model` was one. A first adapter becomes the active one.

    Raises:
        ValueError: Weights that the model has no place for, places left without weights (both happen
            when layer names changed between versions), or other shapes.
    """
    try:
        if not is_peft_model(model):
            from peft import PeftModel  # imports bitsandbytes, which takes seconds: only when needed

            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
                model = PeftModel.from_pretrained(model, adapter, adapter_name=name)
        # For the adapter just made this only reads the file again; it is the call that reports the keys.
        result = model.load_adapter(adapter, adapter_name=name, torch_device=str(model.device))
    except (RuntimeError, ValueError) as error:
        _drop_adapter(model, name)
        raise OptionError("adapter", f"{adapter} does not fit the model: {one_line(error)}") from error
    missing, unexpected = list(result.missing_keys), list(result.unexpected_keys)
    if missing or unexpected:
        _drop_adapter(model, name)
        raise OptionError(
            "adapter",
            f"{adapter} does not fit the model: {len(unexpected)} of its weights have no place "
            f"({', '.join(unexpected[:1]) or 'none'}), {len(missing)} places got no weight "
            f"({', '.join(missing[:1]) or 'none'})",
            "train it again with the installed versions",
        )
    return model.eval()


def detach_adapter(model: Any, name: str) -> Any:
    """Take an adapter out of a `PeftModel`; return the bare base once there is no other."""
    if len(model.peft_config) == 1:
        return model.unload()
    model.delete_adapter(name)
    return model


def is_peft_model(model: Any) -> bool:
    """Tell whether a model is wrapped by PEFT, without importing PEFT."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def base_of(model: Any) -> Any:
    """Return the model that PEFT has wrapped, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model


def adapts_language_alone(model: Any) -> bool:
    """Tell whether all adapters of a `PeftModel` are on layers of its language model."""
    adapted = {name.rpartition(".lora_A")[0] for name, _ in model.named_modules() if ".lora_A" in name}
    return all(".language_model." in name or name.endswith(".lm_head") for name in adapted)


def _drop_adapter(model: Any, name: str) -> None:
    """Leave a model that served other adapters as it was before the failed load."""
    if is_peft_model(model) and name in model.peft_config and len(model.peft_config) > 1:
        model.delete_adapter(name)
