"""Whether the server is there and serves the model, before anything starts."""

from __future__ import annotations

import asyncio

from vlmray.config import InferConfig
from vlmray.engines.openai.asking import LOST_S, list_models
from vlmray.engines.openai.client import Endpoint, EndpointError, api_key, find_model
from vlmray.errors import OptionError


def check_server(config: InferConfig) -> None:
    """Look whether the server of a run serves its model.

    Raises:
        OptionError: It is not there, wants another key, or serves others.
    """
    url = str(config.endpoint)
    try:
        models = asyncio.run(_list(url, api_key(url)))
    except EndpointError as error:
        raise OptionError("endpoint", f": {error}") from error
    try:
        find_model(config.model_id, models, url)
    except EndpointError as error:
        raise OptionError("model_id", f": {error}") from error


def check_served(url: str, model: str, key: str | None) -> None:
    """Look whether a server serves a model.

    Raises:
        EndpointError: It is not there, wants another key, or serves others.
    """
    find_model(model, asyncio.run(_list(url, key)), url)


async def _list(url: str, key: str | None) -> dict[str, int | None]:
    async with Endpoint(url, key) as endpoint:
        return await list_models(endpoint, lost_s=LOST_S)
