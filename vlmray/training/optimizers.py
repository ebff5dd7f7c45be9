"""Which optimizer `--optim` stands for: one of transformers', or Muon with AdamW beside it.

Both halves of `muon` are torch's. Muon's steps are scaled to the size of AdamW's, so one learning rate serves
both and means what it means for AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import AdamW, Muon, Optimizer
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from vlmray.config import FinetuneConfig
from vlmray.errors import OptionError

MUON = "muon"


def check_optimizer(name: str | None) -> None:
    """Refuse an `--optim` that nobody knows.

    Raises:
        ValueError: its one line names those that are known.
    """
    known = (MUON, *(each.value for each in OptimizerNames))
    if name is not None and name not in known:
        raise OptionError("optim", f"{name!r} is unknown", f"known: {', '.join(known)}")


def optimizer_of(config: FinetuneConfig, arguments: SFTConfig) -> tuple[Any, dict[str, Any]] | None:
    """Return the optimizer and its options where transformers has none of that name."""
    if config.optim != MUON:
        return None
    return muon_factory, {
        "lr": arguments.learning_rate,
        "weight_decay": arguments.weight_decay,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
    }


class MuonAdamW(Optimizer):
    """Steps matrices by Muon and all other parameters by AdamW.

    Args:
        matrices: Weights of hidden layers, 2-D.
        others: Embeddings, norms, biases.
        lr: Learning rate of both.
        weight_decay: Decoupled weight decay of the matrices; the others have none.
        **adamw: Passed to AdamW.
    """

    def __init__(
        self,
        matrices: Sequence[Parameter],
        others: Sequence[Parameter],
        *,
        lr: float,
        weight_decay: float = 0.0,
        **adamw: Any,
    ) -> None:
        self._parts: list[Optimizer] = []
        if matrices:
            muon = Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self._parts.append(muon)
        if others:  # LoRA trains matrices alone
            self._parts.append(AdamW(others, lr=lr, weight_decay=0.0, **adamw))
        super().__init__([group for part in self._parts for group in part.param_groups], defaults={})
        self._share()

    def _share(self) -> None:
        """Let the parts work on this optimizer's own groups and state, so that a schedule reaches them."""
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.state = self.state
            part.param_groups = [group]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step."""
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state."""
        super().load_state_dict(state_dict)
        self._share()


def build_muon(model: Any, **options: Any) -> MuonAdamW:
    """Make the optimizer of a model's trainable parameters: linear layers but the last one go to Muon."""
    head = model.get_output_embeddings()
    hidden = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if id(parameter) in hidden]
    others = [parameter for parameter in trained if id(parameter) not in hidden]
    return MuonAdamW(matrices, others, **options)


def muon_factory() -> Any:
    """Return what transformers calls with the model: its trainer takes optimizers of parts this way."""
    return build_muon
