"""The file of `--datasets`: a list of what is asked, each under a name, with options of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

from vlmray.config import BenchmarkConfig
from vlmray.config.common import NAME, DatasetConfig
from vlmray.config.parsing import build_config, read_json_file
from vlmray.errors import OptionError

_OPTIONS = (
    *(field.name for field in dataclasses.fields(DatasetConfig)),
    "dataset_split", "sample_slices", "metrics", "margin", "max_new_tokens",
)  # fmt: skip

_EXPECTED = 'expected a list: [{"name": "charts", "dataset_name": "charts?num_rows=200", "margin": 2}, ...]'


def read_datasets(config: BenchmarkConfig) -> dict[str, BenchmarkConfig]:
    """Return the benchmark of each dataset by its name, in the order of the file.

    Raises:
        ValueError: the file is not there, or not what it should be.
    """
    entries = read_json_file("datasets", str(config.datasets), list, _EXPECTED)
    if not entries:
        raise OptionError("datasets", f"{config.datasets} names none", _EXPECTED)
    found: dict[str, BenchmarkConfig] = {}
    for place, entry in enumerate(entries, 1):
        name, options = _check(str(config.datasets), place, entry)
        if name in found:
            raise OptionError("datasets", f"{config.datasets}: the name {name!r} is given twice")
        folder = f"{config.output_dir}/{name}"
        try:
            found[name] = build_config(
                BenchmarkConfig,
                dataclasses.asdict(config)
                | {"datasets": None, "output_dir": folder}
                | {"push_to_hub": None, "hub_private_repo": None, "report_to": "none"}
                | options,
            )
        except ValueError as error:
            raise OptionError("datasets", f"{config.datasets}: {name}: {error}") from error
    return found


def _check(path: str, place: int, entry: Any) -> tuple[str, dict[str, Any]]:
    """Return name and options of an entry."""
    if not isinstance(entry, dict) or "dataset_name" not in entry:
        raise OptionError("datasets", f"{path}: entry {place} has no dataset_name")
    options = dict(entry)
    name = options.pop("name", None)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise OptionError(
            "datasets", f"{path}: entry {place} has the name {name!r}", "expected letters, digits and .-_"
        )
    if unknown := sorted(options.keys() - set(_OPTIONS)):
        raise OptionError(
            "datasets", f"{path}: {name} has {unknown[0]!r}", f"expected name and {', '.join(_OPTIONS)}"
        )
    return name, options
