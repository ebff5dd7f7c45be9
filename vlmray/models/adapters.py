"""LoRA adapters on a loaded model, which stays the base that it was.

folder -> load_adapter -> Adapter -> use_adapters -> a forward pass

PEFT puts an adapter into a model by replacing modules and parameters. Here that is done to the bare base each
time, what was put there is taken out again and kept, and goes back for the passes of its rows. So every
adapter is what PEFT alone would make of it, whatever others are loaded, have failed or were dropped.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open

from vlmray.errors import OptionError, one_line
from vlmray.models.adapter_kinds import AdapterKind, tell_kind

Place = tuple[torch.nn.Module, str]
"""A module of the base, and the name of a child or parameter of it."""

_NAME = "default"
_loaded = itertools.count(1)


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """What an adapter puts into its base."""

    parts: Mapping[Place, Any] = field(repr=False)
    mixes: bool
    """Whether its rows may share a forward pass with those of others and of the base."""

    number: int = field(default_factory=_loaded.__next__)
    """Which of those that this process loaded."""


def load_adapter(model: Any, adapter: str) -> Adapter:
    """Load a LoRA adapter for a model, which is left as it is.

    Args:
        model: The bare base.
        adapter: Folder with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ValueError: As `attach_adapter`; or the model has an adapter of its own, or weights that wait on
            a CPU or disk for a GPU.
    """
    before = _all_members(model)
    with peft_model(model, adapter):
        parts = {place: getattr(*place) for place, part in before.items() if _differs(getattr(*place), part)}
    replaces = any(isinstance(part, torch.nn.Parameter) for part in parts.values())
    return Adapter(parts, _kind_of(adapter).mixes and not replaces)


@contextlib.contextmanager
def peft_model(model: Any, adapter: str) -> Iterator[Any]:
    """Give a `PeftModel` with an adapter around a model, which is as it was afterwards.

    Args:
        model: The bare base.
        adapter: As `load_adapter` takes it.

    Raises:
        ValueError: As there.
    """
    _check_base(model)
    before = _all_members(model)
    try:
        # PEFT writes whole weights into the parameters that it finds.
        replaced = _known(model, _kind_of(adapter).replaced)
        _put(_copy_parameters(before, [model.get_parameter(name) for name in replaced]))
        yield attach_adapter(model, adapter)
    finally:
        _put(before)
        if hasattr(model, "peft_config"):
            del model.peft_config


@contextlib.contextmanager
def use_adapters(adapters: Sequence[Adapter | None]) -> Iterator[None]:
    """Let each row of the forward passes within meet its own adapter.

    Args:
        adapters: Of each row, None for the base; different ones only if they all mix.
    """
    first, *others = set(adapters)
    parts = _join(adapters) if others else first.parts if first is not None else {}
    before = {place: getattr(*place) for place in parts}
    try:
        _put(parts)
        yield
    finally:
        _put(before)


def attach_adapter(model: Any, adapter: str) -> Any:
    """Put a LoRA adapter into a model for good, and refuse one that would not take full effect.

    Args:
        model: The bare base.
        adapter: Folder with `adapter_config.json` and `adapter_model.safetensors`, of a known kind.

    Returns:
        A `PeftModel` around it.

    Raises:
        ValueError: Weights that are not finite, or that the model has no place for, places left without
            weights (both happen when layer names changed between versions), or other shapes.
    """
    check_finite(adapter)
    if getattr(model, "is_loaded_in_8bit", False) and _read_config(adapter).get("use_dora"):
        problem = f"{adapter} is a DoRA, whose lengths of columns PEFT cannot tell from 8-bit weights"
        raise OptionError("adapter", problem, "pass --quantization 4bit or none")
    from peft import PeftModel  # imports bitsandbytes, which takes seconds: only when needed

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
            model = PeftModel.from_pretrained(model, adapter, adapter_name=_NAME)
        # This only reads the file again; it is the call that reports the keys.
        result = model.load_adapter(adapter, adapter_name=_NAME, torch_device=str(model.device))
    except KeyError as error:
        raise OptionError("adapter", f"{adapter} does not fit the model: it lacks {error}") from error
    except (RuntimeError, TypeError, ValueError) as error:
        raise OptionError("adapter", f"{adapter} does not fit the model: {one_line(error)}") from error
    missing, unexpected = list(result.missing_keys), list(result.unexpected_keys)
    if missing or unexpected:
        raise OptionError(
            "adapter",
            f"{adapter} does not fit the model: {len(unexpected)} of its weights have no place "
            f"({', '.join(unexpected[:1]) or 'none'}), {len(missing)} places got no weight "
            f"({', '.join(missing[:1]) or 'none'})",
            "train it again with the installed versions",
        )
    return model.eval()


def check_finite(adapter: str) -> None:
    """Refuse an adapter with weights that are no numbers.

    Raises:
        ValueError: It has some.
    """
    with safe_open(Path(adapter) / "adapter_model.safetensors", framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118  it is no mapping
            if not torch.isfinite(weights.get_tensor(name).float()).all():
                raise OptionError(
                    "adapter",
                    f"{adapter}: {name} holds values that are not finite (NaN or infinity)",
                    "train it again with a lower --learning_rate, or take an earlier checkpoint",
                )


def is_peft_model(model: Any) -> bool:
    """Tell whether a model is wrapped by PEFT, without importing PEFT."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def base_of(model: Any) -> Any:
    """Return the model that PEFT has wrapped, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model


class RowwiseLora(torch.nn.Module):
    """A linear layer of whose rows some meet an adapter: (B, ..., in) to (B, ..., out).

    Each row is computed as by PEFT's layer for it alone, to the dtypes of the steps.
    """

    def __init__(self, base_layer: Any, num_rows: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.num_rows = num_rows
        self.updates: list[tuple[torch.Tensor, Any, Any, float]] = []

    def add(self, rows: torch.Tensor, layer: Any) -> None:
        """Let rows, by their places, meet what PEFT's layer for an adapter adds."""
        lora_a, lora_b = layer.lora_A[_NAME], layer.lora_B[_NAME]
        self.updates.append((rows.to(lora_a.weight.device), lora_a, lora_b, layer.scaling[_NAME]))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply the layer."""
        if len(input) != self.num_rows:
            raise RuntimeError(f"an adapted layer got {len(input)} rows of a batch of {self.num_rows}")
        output = cast(torch.Tensor, self.base_layer(input))
        for rows, lora_a, lora_b, scaling in self.updates:
            update = lora_b(lora_a(input[rows].to(lora_a.weight.dtype))) * scaling
            output[rows] = (output[rows] + update).to(output.dtype)
        return output


def _join(adapters: Sequence[Adapter | None]) -> dict[Place, RowwiseLora]:
    """Make layers that apply to each row what its own adapter adds."""
    joined: dict[Place, RowwiseLora] = {}
    for adapter in dict.fromkeys(filter(None, adapters)):
        rows = torch.tensor([row for row, other in enumerate(adapters) if other is adapter])
        for place, layer in adapter.parts.items():
            if place not in joined:
                joined[place] = RowwiseLora(layer.get_base_layer(), len(adapters))
            joined[place].add(rows, layer)
    return joined


def _read_config(adapter: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    return config


def _check_base(model: Any) -> None:
    if is_peft_model(model):
        raise ValueError("the engine's model has an adapter of its own; load others into the bare model")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise OptionError(
            "adapter",
            "needs all of the model on GPUs, and some of its weights wait elsewhere for lack of memory",
            "pass --quantization 4bit or take more GPUs",
        )


def _kind_of(adapter: str) -> AdapterKind:
    with safe_open(Path(adapter) / "adapter_model.safetensors", framework="pt") as weights:
        return tell_kind(adapter, _read_config(adapter), list(weights.keys()))


def _all_members(model: Any) -> dict[Place, Any]:
    return {(module, name): part for module in model.modules() for name, part in _members(module)}


def _members(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module.named_children()
    yield from module.named_parameters(recurse=False)


def _known(model: Any, names: frozenset[str]) -> list[str]:
    """Return those that parameters have; the others have no place, which PEFT reports."""
    return [name for name, _ in model.named_parameters(remove_duplicate=False) if name in names]


def _copy_parameters(members: Mapping[Place, Any], wanted: Sequence[torch.nn.Parameter]) -> dict[Place, Any]:
    """Copy parameters; one that several modules share stays shared."""
    copies = {id(part): torch.nn.Parameter(part.detach().clone(), requires_grad=False) for part in wanted}
    return {place: copies[id(part)] for place, part in members.items() if id(part) in copies}


def _differs(part: Any, before: Any) -> bool:
    """Tell whether a part is another; whole weights that are the base's own need not be kept."""
    if isinstance(part, torch.nn.Parameter):
        return part is not before and not torch.equal(part, before)
    return part is not before


def _put(parts: Mapping[Place, Any]) -> None:
    for (module, name), part in parts.items():
        if getattr(module, name) is not part:
            setattr(module, name, part)
