"""Pushing to the Hugging Face hub: tried before a run starts, done when it has ended.

HubRepo.claim -> the run -> HubRepo.push
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from vlmray.errors import OptionError, RunError, one_line

RepoType = Literal["model", "dataset"]

_OPTION = "push_to_hub"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Files that run code when they are loaded: none of them is pushed."""

_TIMEOUT_S = 10.0


class Pushing(Protocol):
    """Options of what is pushed."""

    @property
    def push_to_hub(self) -> str | None:
        """Where to."""
        ...

    @property
    def hub_private_repo(self) -> bool | None:
        """Whether what is made for it is private."""
        ...


class PushError(RunError):
    """A result that the hub did not take; it is whole in the output folder."""


@dataclass(frozen=True, slots=True)
class HubRepo:
    """A repository that this login may write to."""

    repo_id: str
    """With its owner."""

    repo_type: RepoType

    @classmethod
    def of(
        cls, options: Pushing, repo_type: RepoType, suffix: str = "", *, dry_run: bool = False
    ) -> Self | None:
        """Claim the repository that options name; None where they name none."""
        if options.push_to_hub is None:
            return None
        name = f"{options.push_to_hub}{suffix}"
        return cls.claim(name, repo_type, private=options.hub_private_repo, dry_run=dry_run)

    @classmethod
    def claim(cls, name: str, repo_type: RepoType, *, private: bool | None, dry_run: bool = False) -> Self:
        """Make a repository where it is not there, and see that it may be written to.

        Args:
            name: As the option gives it; without an owner it is that of the login.
            repo_type: What it holds.
            private: Whether one that is made is private; None: as its owner's settings have it.
            dry_run: Ask who is logged in, and make nothing.

        Raises:
            OptionError: No such name is possible, there is no token, or it does not suffice.
        """
        from huggingface_hub import HfApi, constants, get_token

        _check_name(name)
        if constants.HF_HUB_OFFLINE:
            raise OptionError(_OPTION, f"{name} needs the hub, and HF_HUB_OFFLINE is set", "unset it")
        if get_token() is None:
            raise OptionError(_OPTION, f"{name} needs a token", "set HF_TOKEN, or log in with: hf auth login")
        api, repo_id = HfApi(), name
        try:
            user = api.whoami()["name"]
            repo_id = name if "/" in name else f"{user}/{name}"
            if not dry_run:
                api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
                api.auth_check(repo_id, repo_type=repo_type, write=True)
        except Exception as error:  # of the hub, or of a network that has many ways to fail
            raise _refused(repo_id, error) from error
        return cls(repo_id, repo_type)

    @property
    def url(self) -> str:
        """Where people find it."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{'datasets/' if self.repo_type == 'dataset' else ''}{self.repo_id}"

    def push(self, files: Mapping[str, Path | bytes], message: str) -> None:
        """Write files in one commit; those that are there and the same are not sent again.

        Args:
            files: By their names in the repository.
            message: Of the commit.

        Raises:
            PushError: The hub did not take them, or one of them is no file to pass on.
        """
        from huggingface_hub import CommitOperationAdd, HfApi

        if pickles := [name for name in files if name.endswith(_PICKLES)]:
            raise PushError(f"{self.url} is not written: {pickles[0]} could run code when it is loaded")
        try:
            HfApi().create_commit(
                self.repo_id,
                [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in files.items()],
                commit_message=message,
                repo_type=self.repo_type,
            )
        except Exception as error:  # the result must not be lost with whatever the network comes up with
            raise PushError(f"{self.url} did not take the result ({_reason(error)})") from error


def license_of(name: str, repo_type: RepoType, folder: Path | None = None) -> Any:
    """Return the licence that a model or dataset says it has; None where that is not known.

    Args:
        name: Its id on the hub.
        repo_type: What it is.
        folder: Where its files lie on this machine, if they do.
    """
    from huggingface_hub import HfApi, metadata_load

    if folder is not None and (folder / "README.md").is_file():
        return (metadata_load(folder / "README.md") or {}).get("license")
    try:
        info: Any = HfApi().repo_info(name, repo_type=repo_type, timeout=_TIMEOUT_S)
    except Exception:  # one that is nowhere has none that is known, whatever the reason
        return None
    return info.card_data.get("license") if info.card_data else None


def _check_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        expected = "expected NAME or OWNER/NAME of letters, digits and -_. between them, at most 96"
        raise OptionError(_OPTION, f"{name!r} cannot be the name of a repository", expected) from error


def _refused(repo_id: str, error: Exception) -> OptionError:
    hints = {
        401: "log in with: hf auth login --force, or set another HF_TOKEN",
        403: "pass a repository of yours, or a token that may write there (huggingface.co/settings/tokens)",
        404: "pass a repository of yours",
    }
    status = _status(error)
    hint = hints.get(status or 0, "see that it can be reached, or leave the option out and push later")
    return OptionError(_OPTION, f"{repo_id} may not be written to ({_reason(error)})", hint)


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def _reason(error: Exception) -> str:
    """Say what the hub said, in short."""
    status, said = _status(error), getattr(error, "server_message", None)
    if status is None:
        return f"{type(error).__name__}: {one_line(error, 200)}"
    return f"HTTP {status}" + (f": {one_line(said, 200)}" if said else "")
