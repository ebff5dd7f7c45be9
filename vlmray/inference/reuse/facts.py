"""Which model the answers of a cache are of: everything that they depend on beside their requests."""

from __future__ import annotations

import dataclasses
from importlib import metadata
from typing import Any

from vlmray.config import EndpointConfig, InferConfig
from vlmray.inference.passing.predictions import versions
from vlmray.models.source import ModelSource
from vlmray.models.templates.chat import template_fingerprint

_OPTIONS = tuple(
    field.name
    for field in dataclasses.fields(EndpointConfig)
    if field.metadata["affects"] == "result" and field.name != "chat_template"  # which goes by its text
)
"""How a model is loaded, or which server has it; how it is asked is a part of each request."""


def model_facts(
    config: InferConfig, model: ModelSource, *, device: str, served: bool = False
) -> dict[str, Any]:
    """Return what tells a model from others.

    A server's goes by the server's URL and its name there: nobody tells when another stands behind them.

    Args:
        config: The options, with the engine that was chosen.
        model: The model.
        device: What kind of device it is loaded on, which decides about its precision.
        served: Whether a server of ours is asked, which does not tell the prompts.
    """
    return {
        **{name: getattr(config, name) for name in _OPTIONS},
        **model.fingerprints,
        **template_fingerprint(config),
        "device": None if config.engine == "openai" else device,
        "served": served,
        "versions": _versions(config.engine),
    }


def _versions(engine: str) -> dict[str, str]:
    """Return the versions of what makes answers of requests."""
    found = {} if engine == "openai" else versions(engine)
    names = {"vlmray", *found} - {"ray", "pyarrow"}
    return {**{name: found.get(name) or metadata.version(name) for name in sorted(names)},
            "pillow": metadata.version("pillow")}  # fmt: skip
