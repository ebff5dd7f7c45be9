"""Adapters that a server offers: their names, where they lie, and a local copy of those that lie elsewhere.

'name=folder,...' and a folder of folders -> AdapterCatalog -> name -> local folder
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem, copy_files

from vlmray.config import NAME
from vlmray.models.checks import check_adapter_folder
from vlmray.storage.cache import cache_folder, make_once
from vlmray.storage.filesystem import open_filesystem

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class AdapterCatalog:
    """The adapters of one base model.

    Args:
        model_id: The base, to check adapters against.
        adapters: Folder or URI by name.
        adapter_dir: Folder or URI whose subfolders are adapters too, under their own names. It is listed
            whenever it is asked, so an adapter may come later.
    """

    def __init__(self, model_id: str, adapters: Mapping[str, str], adapter_dir: str | None = None) -> None:
        self.model_id = model_id
        self.adapters = dict(adapters)
        self.adapter_dir = adapter_dir

    def names(self) -> list[str]:
        """Return the names of all adapters, those of the folder last.

        Raises:
            OSError: The folder of adapters cannot be listed.
        """
        return [*self.adapters, *(name for name in self._listed() if name not in self.adapters)]

    def check(self) -> None:
        """Check the adapters given by name, as far as they are on this machine, and that the folder is there.

        Raises:
            FileNotFoundError: A folder is not there or lacks files.
            ValueError: An adapter was made for another base.
        """
        for path in self.adapters.values():
            if "://" not in path:
                check_adapter_folder(path, self.model_id)
        try:
            self._listed()
        except OSError as error:
            raise FileNotFoundError(f"--adapter_dir {self.adapter_dir}: {error}") from error

    def fetch(self, name: str) -> Path:
        """Return a local folder of an adapter, copied into the cache if it lies behind a URI.

        Raises:
            FileNotFoundError: There is none of that name, or it lacks files.
            ValueError: It was made for another base.
            OSError: It cannot be copied.
        """
        if name not in self.adapters and (self.adapter_dir is None or not NAME.fullmatch(name)):
            raise FileNotFoundError(f"no adapter named {name!r}")
        path = self.path(name)
        folder = _copy(path) if "://" in path else Path(path).expanduser()
        check_adapter_folder(str(folder), self.model_id)
        return folder

    def path(self, name: str) -> str:
        """Return where an adapter lies: a folder or a URI."""
        return self.adapters.get(name) or f"{(self.adapter_dir or '').rstrip('/')}/{name}"

    def local_folders(self) -> list[str]:
        """Return the folders of those adapters that lie on this machine."""
        try:
            paths = map(self.path, self.names())
            return [path for path in paths if (Path(path).expanduser() / _CONFIG).is_file()]
        except OSError:  # whoever asks one of them is told
            return []

    def _listed(self) -> list[str]:
        if self.adapter_dir is None:
            return []
        filesystem, root = _open(self.adapter_dir)
        entries = filesystem.get_file_info(FileSelector(root))
        folders = sorted(entry.path for entry in entries if entry.type == FileType.Directory)
        infos = filesystem.get_file_info([f"{folder}/{_CONFIG}" for folder in folders])
        names = [Path(info.path).parent.name for info in infos if info.is_file]
        return [name for name in names if NAME.fullmatch(name)]


def _open(path: str) -> tuple[FileSystem, str]:
    return open_filesystem(path if "://" in path else str(Path(path).expanduser().absolute()))


def _copy(uri: str) -> Path:
    """Copy an adapter into the cache, once for every version of it; processes may do so together."""
    filesystem, root = _open(uri)
    infos = filesystem.get_file_info([f"{root}/{name}" for name in (_CONFIG, _WEIGHTS)])
    version = hashlib.sha256(repr([uri, *((info.size, info.mtime_ns) for info in infos)]).encode())
    folder = cache_folder() / "adapters" / version.hexdigest()[:16]

    def copy(scratch: Path) -> None:
        for info in infos:
            if info.is_file:
                copy_files(
                    info.path, str(scratch / info.base_name), source_filesystem=filesystem,
                    destination_filesystem=LocalFileSystem(),
                )  # fmt: skip

    make_once(folder, copy)
    return folder
