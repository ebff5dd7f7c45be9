"""Names of models: built-in, a folder, or on the hub; what stands behind each, and whether it will do."""

from __future__ import annotations

import hashlib
from pathlib import Path

from vlmray.builtin.models import BUILDS, BUILTIN, BUILTIN_FOLDER
from vlmray.models import checks
from vlmray.storage import hub
from vlmray.storage.cache import cache_folder, make_once
from vlmray.storage.hub import local_folder

# ---------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------


def is_built_in(model_id: str) -> bool:
    """Tell whether a model id is one of this module's names."""
    return model_id == BUILTIN or model_id in BUILDS


def resolve_model_id(model_id: str) -> str:
    """Return the folder of a built-in model for its name, and any other id unchanged.

    Models with random weights are built on first use under `$VLMRAY_CACHE`, or `~/.cache/vlmray`. A folder
    appears by one rename, so processes that start together may all ask for it.
    """
    if model_id == BUILTIN:
        return str(BUILTIN_FOLDER)
    if model_id not in BUILDS:
        return model_id
    build, version = BUILDS[model_id]
    folder = cache_folder() / f"{model_id}-{version}"
    make_once(folder, build)
    return str(folder)


def check_model(model_id: str) -> None:
    """Check on the driver what a worker would only find after it started.

    Raises:
        ValueError: not a model, or the hub does not answer.
        FileNotFoundError: a folder that is not there or lacks weights.
    """
    if not is_built_in(model_id):
        checks.check_model_folder(model_id)
        if local_folder(model_id) is None:
            hub.check_reachable(model_id, "model", option="--model_id")


def fingerprint(path: str) -> str:
    """Return 16 hex digits that change when a checkpoint does.

    An adapter folder is hashed in full (config and weights), so retraining in place shows. A model
    folder is hashed by its config and by the names and sizes of its weight files, which takes no time
    on 15 GB. Anything else, a hub id, is hashed by name.
    """
    digest = hashlib.sha256()
    folder = Path(path).expanduser()
    if (folder / "adapter_config.json").is_file():
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if (folder / name).is_file():
                with (folder / name).open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    elif folder.is_dir():
        if (folder / "config.json").is_file():
            digest.update((folder / "config.json").read_bytes())
        for file_path in sorted(folder.glob("*.safetensors")):
            digest.update(f"{file_path.name} {file_path.stat().st_size}\n".encode())
    else:
        digest.update(path.encode())
    return digest.hexdigest()[:16]
