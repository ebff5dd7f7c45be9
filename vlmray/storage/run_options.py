"""What a folder is resumed for: the same job with the same options, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

Earlier = Literal["resume", "require", "refuse", "delete"]
"""What is done with the results of an earlier run: it is gone on with, has to be there to be gone on with,
must not be there, or is deleted."""

Options = Mapping[str, Any]

_FINGERPRINTS = {
    "model_fingerprint": ("weights", "model_id"),
    "adapter_fingerprint": ("weights", "adapter"),
    "dataset_fingerprint": ("data", "dataset_name"),
    "images_fingerprint": ("image files", "dataset_name"),
    "chat_template_fingerprint": ("text", "chat_template"),
}
"""Options that say what a name stood for: of what, and the option that is the name."""


def find_objection(
    found: Options | None, options: Options, *, has_results: bool, earlier: Earlier
) -> str | None:
    """Tell why a run may not have a folder; None where it may.

    A run that ended before its first result binds nobody to its options, but keeps other jobs out.

    Args:
        found: What the folder records of the run that wrote there; None where it records nothing.
        options: Those of the run that is about to start.
        has_results: Whether the folder holds any.
        earlier: What is to be done with them.
    """
    if found is None and has_results:
        return "holds results but no options.json that says what they are of; choose another folder"
    if found is None:
        return "holds no run to go on with; leave out --resume" if earlier == "require" else None
    if _job_of(found) != _job_of(options):
        return (
            f"holds another run (job was {_job_of(found)!r}, now {_job_of(options)!r}); choose another folder"
        )
    if not has_results or earlier == "delete":
        return None
    if earlier == "refuse":
        return (
            "holds an earlier run; pass --resume to go on with it, --overwrite to delete it, "
            "or choose another folder"
        )
    return _describe_changes(found, options)


def _job_of(options: Options) -> str:
    return str(options.get("job", "infer"))  # which was the first job, and records no name


def changed_options(found: Options, options: Options) -> list[str]:
    """Name the options that differ from what was found in a JSON file; one that is not there is None."""
    options = json.loads(json.dumps(options))
    return sorted(name for name in found.keys() | options.keys() if found.get(name) != options.get(name))


def _describe_changes(found: Options, options: Options) -> str | None:
    """Say how two runs differ; what lies behind a name is spoken of where the name itself is the same."""
    changed = changed_options(found, options)
    if not changed:
        return None
    details = [
        f"{name} was {found.get(name)!r}, now {options.get(name)!r}"
        for name in changed
        if name not in _FINGERPRINTS
    ]
    problem = "holds another run"
    if not details and "dataset_fingerprint" not in found:
        problem = "was written by an earlier version of vlmray"
        details = ["it did not record what tells whether weights and dataset have changed since"]
    for name in () if details else changed:
        what, option = _FINGERPRINTS[name]
        details.append(
            f"the {what} of {option} {options.get(option)!r} changed: "
            f"fingerprint was {found.get(name)!r}, now {options.get(name)!r}"
        )
    return f"{problem} ({'; '.join(details)}); choose another folder, or pass --overwrite to delete it"
