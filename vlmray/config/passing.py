"""Options of what is passed on: to the Hugging Face hub, to trackers of experiments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlmray.config.common import Options
from vlmray.config.marks import option
from vlmray.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class PushConfig(Options):
    """Whether the result is pushed to the hub."""

    push_to_hub: str | None = option(None, affects="run")
    """Repository on the Hugging Face hub to push the result to, with a filled card: NAME or OWNER/NAME. It is
    made where it is not there; the token is that of HF_TOKEN or of `hf auth login`."""

    hub_private_repo: bool | None = option(None, affects="run")
    """Whether a repository that is made for it is private; default: as its owner's settings have it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hub_private_repo is not None and self.push_to_hub is None:
            raise OptionError("hub_private_repo", "is about what --push_to_hub makes", "pass that too")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Options):
    """Whether the figures of a run are sent to a tracker."""

    report_to: Literal["none", "wandb", "mlflow"] = option("none", affects="run")
    """Where to send the figures of the run when it has ended, beside the report."""
