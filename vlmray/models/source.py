"""Names of models: built-in, a folder, or on the hub; what stands behind each, and whether it will do.

    model_id, adapter -> ModelSource.open, once per job on its driver -> path, folder, fingerprint

Workers, on machines with other files, find the same name anew by `resolve_model_id`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmray.builtin.models import BUILDS, BUILTIN, BUILTIN_FOLDER
from vlmray.models import checks
from vlmray.models.families import family_of
from vlmray.models.families.base import Family
from vlmray.storage import hub
from vlmray.storage.cache import cache_folder, make_once
from vlmray.storage.fingerprints import digest, digest_content
from vlmray.storage.hub import local_folder
from vlmray.storage.weights import read_header

_LOG = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------


def is_built_in(model_id: str) -> bool:
    """Tell whether a model id is one of this module's names."""
    return model_id == BUILTIN or model_id in BUILDS


def hub_model(model_id: str) -> str | None:
    """Return a model id that others find on the hub too; None for what is built in or lies here."""
    path = Path(model_id).expanduser()
    return None if is_built_in(model_id) or path.is_absolute() or path.exists() else model_id


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


# ---------------------------------------------------------------------------------------------
# What stands behind a name
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model, and an adapter of it, as a job's driver finds them; opened once, before anything heavy."""

    name: str
    """As the user gave it."""

    path: str
    """What it is loaded by on this machine: its folder, or its id on the hub."""

    folder: Path | None = None
    """Where its files lie on this machine, be it in the hub's cache; None where only the hub has them."""

    commit: str | None = None
    """The hub's commit: of the snapshot in the cache, or the newest where there is none."""

    adapter: str | None = None

    @classmethod
    def open(cls, model_id: str, adapter: str | None = None) -> ModelSource:
        """Find a model and check on the driver what a worker would only find after it started.

        Args:
            model_id: Built-in name, checkpoint folder or hub id.
            adapter: Folder of a LoRA adapter.

        Raises:
            ValueError: not a model, or the hub does not answer, or the adapter was made for another base.
            FileNotFoundError: a folder that is not there or lacks files.
        """
        if not is_built_in(model_id):
            checks.check_model_folder(model_id)
        found = cls.find(model_id, adapter)
        if found.folder is None:
            commit = hub.check_reachable(model_id, "model")
            found = dataclasses.replace(found, commit=commit)
        if adapter:
            checks.check_adapter_folder(adapter, found.path)
        if found.folder is not None:
            warn_of_settings(model_id, _read_settings(found.folder))
        return found

    @classmethod
    def find(cls, model_id: str, adapter: str | None = None) -> ModelSource:
        """Find a model that a driver has checked."""
        path = resolve_model_id(model_id)
        folder = local_folder(path)
        is_cached = folder is not None and folder != Path(path).expanduser()
        commit = folder.name if folder is not None and is_cached else None
        return cls(name=model_id, path=path, folder=folder, commit=commit, adapter=adapter)

    @property
    def family(self) -> Family | None:
        """What is known of it; None where only the hub has its files."""
        if self.folder is None:
            return None
        return family_of(json.loads((self.folder / "config.json").read_text(encoding="utf-8")))

    @property
    def address(self) -> str:
        """What a worker finds it by, whatever folder that works in: a name, or an absolute path."""
        is_name = self.folder is None or self.commit is not None or is_built_in(self.name)
        return self.name if is_name else str(Path(self.path).expanduser().absolute())

    @property
    def adapter_address(self) -> str | None:
        """What a worker finds the adapter by."""
        folder = Path(self.adapter or "").expanduser()
        return str(folder.absolute()) if self.adapter and folder.is_dir() else self.adapter

    @functools.cached_property
    def fingerprint(self) -> str:
        """What changes when the weights do: the hub's commit, or 16 hex digits of the folder's files.

        A model that is neither here nor known to the hub (a server's, the fake engine's) goes by its name.
        """
        if self.commit is not None:
            return self.commit
        return digest(self.name) if self.folder is None else fingerprint(self.folder)

    @property
    def fingerprints(self) -> dict[str, str]:
        """What a run records to tell later whether it would be answered by the same weights."""
        found = {"model_fingerprint": self.fingerprint}
        if self.adapter:
            folder = Path(self.adapter).expanduser()
            found["adapter_fingerprint"] = fingerprint(folder) if folder.is_dir() else digest(self.adapter)
        return found


_WHOLE_BYTES = 64 << 20
_MOST_BLOCKS, _BLOCK = 256, 4096
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def fingerprint(folder: Path) -> str:
    """Return 16 hex digits that change when a checkpoint or adapter does, within a second for 15 GB.

    All that loading reads counts, under its name: config, tokenizer, processor, chat template and weights,
    but not where it lies or when it was written. A weight file beyond 64 MiB counts by its size, its header
    (names, types and shapes) and 4 KiB from the middle of its tensors, of 256 spread over it where there are
    more: training changes all of a tensor. One number changed by hand in such a file may go unseen.
    """
    is_adapter = (folder / _ADAPTER[0]).is_file() and not (folder / "config.json").is_file()
    patterns = _ADAPTER if is_adapter else (*checks.SIDE_FILES, "*.safetensors")
    files = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    return digest(*((path.name, _digest_file(path)) for path in files))


def _digest_file(path: Path) -> bytes:
    if path.suffix != ".safetensors" or path.stat().st_size <= _WHOLE_BYTES:
        return digest_content(path)
    header, start = read_header(path)
    tensors = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    found = hashlib.sha256(repr((path.stat().st_size, tensors)).encode())
    with path.open("rb", buffering=0) as file:
        for _, tensor in tensors[:: -(-len(tensors) // _MOST_BLOCKS) or 1]:
            begin, end = tensor["data_offsets"]
            file.seek(start + max(begin, (begin + end - _BLOCK) // 2))
            found.update(file.read(min(_BLOCK, end - begin)))
    return found.digest()


# ---------------------------------------------------------------------------------------------
# What its generation config asks for in vain
# ---------------------------------------------------------------------------------------------

_NOT_FOLLOWED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "guidance_scale": (1,),
    "constraints": ([],),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "stop_strings": ([], ""),
    "token_healing": (False,),
    "watermarking_config": (),
    "max_time": (),
}
"""Settings that would change answers, with the values, beside None, at which they do not."""


def settings_not_followed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a generation config that would change answers and are not followed."""
    return {
        name: config[name]
        for name, neutral in _NOT_FOLLOWED.items()
        if config.get(name) is not None and config[name] not in neutral
    }


def warn_of_settings(model_id: str, config: Mapping[str, Any]) -> None:
    """Say in one line which settings of a model's generation config are not followed."""
    found = settings_not_followed(config)
    if found:
        _LOG.warning(
            "%s: its generation_config.json has %s, which is not followed: each answer is greedy or sampled "
            "by itself",
            model_id, ", ".join(f"{name}={value!r}" for name, value in found.items())[:300],
        )  # fmt: skip


def _read_settings(folder: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there is none, or loading will say what is wrong with it
        return {}
    return found if isinstance(found, dict) else {}
