"""Tiny models of all families, each loaded once."""

from __future__ import annotations

import pytest

from helpers.families import TINY
from helpers.families.contract import Checkpoint
from helpers.families.loading import load_tiny


@pytest.fixture(scope="module", params=list(TINY))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny model of a family."""
    return load_tiny(request.param, tmp_path_factory.mktemp(request.param))
