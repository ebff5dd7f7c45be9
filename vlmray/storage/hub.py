"""The Hugging Face hub, as seen from this machine: is a repository cached, reachable, there at all?

Asked once, before any work starts, so that a machine without a network gets one clear line at once
instead of a minute of retries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from vlmray.errors import OptionError

RepoType = Literal["model", "dataset"]

_TIMEOUT_S = 10.0
_OPTION = {"model": "model_id", "dataset": "dataset_name"}
_HINT = {
    "model": "give a local folder, or builtin, or fill the cache below HF_HOME beforehand",
    "dataset": "give a local folder or file, or charts, or fill the cache below HF_HOME beforehand",
}


class HubUnavailableError(OptionError):
    """A repository that can neither be reached nor found in the local cache."""


def cached_snapshot(repo_id: str, repo_type: RepoType) -> Path | None:
    """Return the folder of a repository's newest snapshot in the local hub cache, if there is one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, repo_type=repo_type, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def check_reachable(repo_id: str, repo_type: RepoType) -> str | None:
    """Ask the hub for a repository, once; return its newest commit.

    Raises:
        HubUnavailableError: the hub cannot be reached, or it has no such repository, or access to it
            needs a login. The message names what works without the hub.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return HfApi().repo_info(repo_id, repo_type=repo_type, timeout=_TIMEOUT_S).sha
    except GatedRepoError:
        problem = "needs accepted terms and a login (huggingface-cli login, or HF_TOKEN)"
    except RepositoryNotFoundError:
        problem = f"is not a {repo_type} on the hub that this login can see"
    except HFValidationError:
        problem = f"is neither a local path nor the name of a {repo_type} on the hub"
    except Exception as error:
        # Offline mode, DNS, proxies and TLS each raise their own class, by library and version.
        problem = f"is not here and the hub cannot be reached ({type(error).__name__})"
    raise HubUnavailableError(_OPTION[repo_type], f"{repo_id!r} {problem}", _HINT[repo_type])


def local_folder(model_id: str) -> Path | None:
    """Return where a model's files lie on this machine: its folder or its hub cache snapshot, else None.

    A snapshot that holds the config may lack weights; who loads the model fetches them.
    """
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(model_id, "config.json")
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None
