"""An earlier run on the same samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlmray.benchmark.samples import prompt_of
from vlmray.errors import OptionError
from vlmray.schema import Row

PREDICTIONS = "predictions.parquet"


def read_baseline(path: str, now: Mapping[str, Any], models: Sequence[str]) -> dict[str, dict[str, Row]]:
    """Read an earlier run's answers.

    Args:
        path: Its `results.json`.
        now: What is asked now, as `describe_samples` says it.
        models: Names of those that are asked.

    Raises:
        ValueError: it is not there, or asked something else.
    """
    file = Path(path).expanduser()
    try:
        then = json.loads(file.read_text(encoding="utf-8"))
        rows = pq.read_table(file.parent / PREDICTIONS).to_pylist()
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise OptionError(
            "baseline", f"{path}: {error}", "pass the results.json of a finished run"
        ) from error
    parts = [(then.get("dataset", {}), now["dataset"])]
    compared = [name for name in models if name in then.get("models", {})]
    parts += [(prompt_of(then, name), prompt_of(now, name)) for name in compared]
    for before, after in parts:
        for name in sorted({*before, *after} - {"dataset_name"}):  # the same samples may have moved
            if (old := before.get(name)) != (new := after.get(name)):
                raise OptionError(
                    "baseline", f"{path} is not comparable: its {name} was {old!r} and is {new!r} now"
                )
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["model"], {})[row["sample_id"]] = row
    return found


EARLIER = "it was in the earlier run"
"""What a model is compared with by `--baseline`, in a sentence."""
