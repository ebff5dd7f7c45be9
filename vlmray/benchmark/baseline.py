"""An earlier run on the same samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlmray.errors import OptionError
from vlmray.schema import Row

PREDICTIONS = "predictions.parquet"


def read_baseline(path: str, now: Mapping[str, Any]) -> dict[str, dict[str, Row]]:
    """Read an earlier run's answers.

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
    for part in ("dataset", "prompt"):
        for name, value in now[part].items():
            before = then.get(part, {}).get(name)
            if before != value and name != "dataset_name":  # the same samples may have moved
                raise OptionError(
                    "baseline", f"{path} is not comparable: its {name} was {before!r} and is {value!r} now"
                )
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["model"], {})[row["sample_id"]] = row
    return found


EARLIER = "it was in the earlier run"
"""What a model is compared with by `--baseline`, in a sentence."""
