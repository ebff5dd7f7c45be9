"""Answers of given lengths, in a job that has no option for it: its workers ask for them.

A job that is started with `environment(path)` has Ray call `force_lengths` in each of its workers; nothing
else about it changes.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmray.schema import GenerationRequest

_LENGTHS = "VLMRAY_BENCHMARK_LENGTHS"


def write_lengths(path: Path, requests: Sequence[GenerationRequest]) -> None:
    """Write how many tokens each request asks for."""
    path.write_text(json.dumps({request.request_id: request.max_new_tokens for request in requests}))


def environment(path: Path) -> dict[str, str]:
    """Return the environment of a job whose answers have these lengths."""
    hook = {"runtime_env": {"worker_process_setup_hook": f"{__name__}.force_lengths"}}
    return {**os.environ, _LENGTHS: str(path), "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(hook)}


def force_lengths() -> None:
    """Have this process ask for answers of the lengths in the environment."""
    from vlmray.inference import stages

    lengths = json.loads(Path(os.environ[_LENGTHS]).read_text())
    make_requests = stages.make_requests

    def make_forced(*args: Any) -> list[GenerationRequest]:
        return [
            dataclasses.replace(request, max_new_tokens=lengths[request.request_id], ignore_eos=True)
            for request in make_requests(*args)
        ]

    stages.make_requests = make_forced
