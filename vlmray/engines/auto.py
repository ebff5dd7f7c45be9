"""What `--engine auto` comes to: vLLM where it is installed and can run what is asked for, else transformers.

options -> installed? -> adapters -> an earlier run -> GPUs -> model -> EngineChoice

Made once, on a job's driver; whoever comes after it knows only the engine that was chosen. What costs time
is asked last: GPUs of the cluster, and vLLM itself, which has to be imported for that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from vlmray.config import EngineConfig
from vlmray.engines.vllm.options import Installed, find_installed
from vlmray.engines.vllm.suitability import find_model_objection, find_objection
from vlmray.errors import OptionError

C = TypeVar("C", bound=EngineConfig)

FindObjection = Callable[[], str | None]
"""Tells why the cluster cannot run vLLM; None where it can."""


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """An engine, and why it is this one."""

    engine: str
    reason: str
    is_news: bool = True
    """Whether to say so at the start of a job: where vLLM is not installed, everybody would read it."""

    def __str__(self) -> str:
        """Say it in one line."""
        return f"engine: {self.engine} ({self.reason})"

    def settle(self, config: C) -> C:
        """Return the options with the engine that was chosen."""
        chosen: Any = {"engine": self.engine}
        return dataclasses.replace(config, **chosen)


def choose_engine(
    config: EngineConfig,
    model_ids: Sequence[str],
    adapters: Sequence[str],
    *,
    find_cluster_objection: FindObjection,
    begun_with: str | None = None,
) -> EngineChoice:
    """Choose what answers.

    Args:
        config: The options.
        model_ids: The models that shall be answered, all by one engine.
        adapters: Folders or URIs of the adapters that are known.
        find_cluster_objection: Asks the cluster; called only where the answer decides.
        begun_with: The engine of the run that is gone on with, if one is.

    Raises:
        OptionError: An option is for vLLM alone, and that is not installed.
    """
    if config.engine != "auto":
        return EngineChoice(config.engine, "as --engine says", is_news=False)
    installed = find_installed()
    choice = _choose_by_options(config, installed)
    if choice is not None or installed is None:
        return choice or EngineChoice("transformers", "vLLM is not installed", is_news=False)
    objection = installed.objection or find_objection(config, model_ids, adapters)
    goes_on = "what is in --output_dir was answered with it"
    if objection is None and begun_with == "transformers":
        return EngineChoice("transformers", goes_on)
    if objection is None and not (begun_with == "vllm" and installed.is_for_cpus):
        objection = find_cluster_objection()
    objection = objection or _first_model_objection(config, model_ids)
    if objection is not None:
        return EngineChoice("transformers", f"not vLLM {installed.version}: {objection}")
    if begun_with == "vllm":
        return EngineChoice("vllm", f"{installed.version}; {goes_on}")
    return EngineChoice("vllm", f"{installed.version} is installed and the cluster has GPUs")


def _choose_by_options(config: EngineConfig, installed: Installed | None) -> EngineChoice | None:
    """Choose by the options that not all engines know; None where they leave both."""
    possible, option = config.possible_engines()
    if possible == ("openai",):
        return EngineChoice("openai", "--endpoint names a server")
    if possible == ("vllm",) and installed is None:
        problem = "is for --engine vllm, which is not installed"
        raise OptionError(str(option), problem, "pip install 'vlmray[vllm]', or leave it out")
    if len(possible) > 1 or installed is None:
        return None
    other = "vllm" if possible == ("transformers",) else "transformers"
    return EngineChoice(possible[0], f"--{option} is not for {other}")


def _first_model_objection(config: EngineConfig, model_ids: Sequence[str]) -> str | None:
    found = (find_model_objection(config, model_id) for model_id in dict.fromkeys(model_ids))
    return next(filter(None, found), None)
