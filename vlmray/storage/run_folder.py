"""The output folder of a run: files that are whole or not there, and options that say what they are of.

    options.json            what the results depend on; only a run that has the same goes on with them
    ...                     the results, which a class of each job knows
    report.html, run.json   written last: run.json is there exactly when the run completed

A run that is killed anywhere leaves a folder that resumes. The folder may be local or behind any URI that
pyarrow opens (s3://, gs://, ...). No Ray here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem, copy_files

from vlmray.errors import RunError, one_line
from vlmray.storage.filesystem import absolute_uri, open_filesystem, writes_whole_files
from vlmray.storage.run_options import Earlier, find_objection
from vlmray.storage.threads import NUM_THREADS

_OPTIONS, _RUN, _REPORT = "options.json", "run.json", "report.html"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A folder that a run writes to. Pickles as its URI, so that tasks on any node can write too."""

    option: ClassVar[str] = "output_dir"
    """The option that names it."""

    uri: str

    dry_run: bool = field(default=False, kw_only=True)
    """Read it and leave it as it is: what would be written or deleted is not."""

    @property
    def is_local(self) -> bool:
        """Whether it lies on one machine's disk rather than where every node can write."""
        return "://" not in self.uri or self.uri.startswith("file://")

    @classmethod
    def create(cls, output_dir: str) -> Self:
        """Make the folder, or open it where it is there, whatever it holds.

        Raises:
            ValueError: it cannot be made.
        """
        folder = cls(absolute_uri(output_dir))
        with cls._naming_the_folder(output_dir):
            folder.make()
        return folder

    @classmethod
    def find(cls, output_dir: str, job: str) -> Self:
        """Name a folder of a job that records no options; nothing is made yet.

        Raises:
            ValueError: another job wrote there.
        """
        folder = cls(absolute_uri(output_dir))
        with cls._naming_the_folder(output_dir):
            found = folder.read_options()
        cls._check(output_dir, find_objection(found, {"job": job}, has_results=False, earlier="resume"))
        return folder

    @classmethod
    def open(
        cls, output_dir: str, options: Mapping[str, Any], *, earlier: Earlier = "resume", **fields: Any
    ) -> Self:
        """Make the folder of a run, or open the one that an earlier run left.

        Args:
            output_dir: Local folder or URI.
            options: Everything the results depend on (model, prompt, ...), as JSON values; with `job`, the
                name of the job, unless that is inference.
            earlier: What is done with the results of an earlier run.
            fields: What else the class of the folder has.

        Raises:
            ValueError: the folder cannot be written, or holds a run that `earlier` does not allow.
        """
        folder = cls(absolute_uri(output_dir), **fields)
        with cls._naming_the_folder(output_dir):
            folder.make()
            found, has_results = folder.read_options(), folder.has_results()
            cls._check(output_dir, find_objection(found, options, has_results=has_results, earlier=earlier))
            if found is not None and (earlier == "delete" or not has_results):
                folder.clear()
            folder.remove_leftovers()
            folder.write_json(_OPTIONS, options)  # written again, to see that the folder takes files
        return folder

    def read_options(self) -> dict[str, Any] | None:
        """Return the options of the run that wrote here, or None in a new folder."""
        return self.read_json(_OPTIONS, cure="choose another folder")

    def written(self) -> list[str]:
        """Name the files and folders that runs of this job left here, beside report and manifest."""
        return []

    def has_results(self) -> bool:
        """Whether there is anything to go on with."""
        return bool(self.written())

    def clear(self) -> None:
        """Delete what earlier runs wrote, and nothing else that may lie in the folder."""
        self.reopen()
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            list(pool.map(self.delete, [*self.written(), _REPORT]))

    def reopen(self) -> None:
        """Mark the folder as holding an unfinished run."""
        self.delete(_RUN)

    def finish(self, run: Mapping[str, Any], report: str) -> None:
        """Write the report and, last, the manifest that says the run completed."""
        self.write_text(_REPORT, report)
        self.write_json(_RUN, run)

    def read_json(self, name: str, cure: str) -> dict[str, Any] | None:
        """Read a JSON object, or None where the file is not there.

        Args:
            name: Name of the file.
            cure: What to do about a damaged one.

        Raises:
            ValueError: it holds something else.
        """
        try:
            value = json.loads(self._read(name))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(self._damaged(name, f"not JSON: {error}", cure)) from error
        if not isinstance(value, dict):
            raise ValueError(self._damaged(name, f"a {type(value).__name__} instead of an object", cure))
        return value

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write an object as JSON, atomically."""
        self.write_text(name, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, atomically."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file so that it appears whole or not at all."""
        if self.dry_run:
            return
        filesystem, root = open_filesystem(self.uri)
        path = f"{root}/{name}"
        whole = writes_whole_files(filesystem)
        target = path if whole else f"{root}/.{name.replace('/', '-')}-{uuid.uuid4().hex}.tmp"
        with _noticing_a_full_disk(self.uri):
            with filesystem.open_output_stream(target) as stream:
                stream.write(data)
            if not whole:
                filesystem.create_dir(path.rpartition("/")[0], recursive=True)
                filesystem.move(target, path)

    def write_folder(self, name: str, source: Path) -> None:
        """Copy a local folder so that it appears whole, in place of what was there under the name.

        In an object store, which has no folders, only each of its files does.
        """
        self.remove_leftovers(re.escape(name))
        filesystem, root = open_filesystem(self.uri)
        whole = writes_whole_files(filesystem)
        target = f"{root}/{name}" if whole else f"{root}/.{name}-{uuid.uuid4().hex}.tmp"
        if whole:
            self.delete(name)
        filesystem.create_dir(target, recursive=True)
        with _noticing_a_full_disk(self.uri):
            copy_files(
                str(source), target, source_filesystem=LocalFileSystem(), destination_filesystem=filesystem
            )
        if not whole:
            self.delete(name)
            filesystem.move(target, f"{root}/{name}")

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with all it holds, if it is there."""
        if self.dry_run:
            return
        filesystem, root = open_filesystem(self.uri)
        _delete(filesystem, filesystem.get_file_info(f"{root}/{name}"))

    def has(self, name: str) -> bool:
        """Tell whether a file or folder of this name is in here."""
        filesystem, root = open_filesystem(self.uri)
        return bool(filesystem.get_file_info(f"{root}/{name}").type != FileType.NotFound)

    def remove_leftovers(self, names: str = ".+") -> None:
        """Delete the half-written files and folders of a run that was killed; `names` is a pattern."""
        filesystem, root = open_filesystem(self.uri)
        temporary = re.compile(rf"\.{names}-[0-9a-f]{{32}}\.tmp")
        for info in filesystem.get_file_info(FileSelector(root, allow_not_found=True)):
            if temporary.fullmatch(info.base_name) and not self.dry_run:
                _delete(filesystem, info)

    def make(self) -> None:
        """Make the folder where it is not there yet."""
        if self.dry_run:
            return
        filesystem, root = open_filesystem(self.uri)
        filesystem.create_dir(root, recursive=True)

    def _read(self, name: str) -> bytes:
        filesystem, root = open_filesystem(self.uri)
        with filesystem.open_input_file(f"{root}/{name}") as file:
            return bytes(file.read())

    def _list(self, folder: str = "", *, folders: bool = False) -> list[str]:
        """List the files in here, or in a folder in here; or the folders in there."""
        filesystem, root = open_filesystem(self.uri)
        selector = FileSelector(f"{root}/{folder}".rstrip("/"), allow_not_found=True)
        infos = filesystem.get_file_info(selector)
        names = (info.base_name for info in infos if info.is_file != folders)
        return sorted(name for name in names if not name.startswith("."))

    def _damaged(self, name: str, problem: object, cure: str) -> str:
        return f"--{self.option}: {self.uri}/{name} is damaged ({problem}); {cure}"

    @classmethod
    @contextlib.contextmanager
    def _naming_the_folder(cls, output_dir: str) -> Iterator[None]:
        """Turn what a file system raises into a mistake in the option."""
        try:
            yield
        except (OSError, pa.ArrowInvalid) as error:
            reason = one_line(error, 1000)
            raise ValueError(f"--{cls.option} {output_dir} cannot be written: {reason}") from error

    @classmethod
    def _check(cls, output_dir: str, objection: str | None) -> None:
        if objection is not None:
            raise ValueError(f"--{cls.option} {output_dir} {objection}")


@contextlib.contextmanager
def _noticing_a_full_disk(uri: str) -> Iterator[None]:
    """Turn what a file system raises where there is no room into a line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise RunError(f"no space left on device: {uri}; free some and run again") from error
        raise


def _delete(filesystem: FileSystem, info: FileInfo) -> None:
    if info.type == FileType.File:
        filesystem.delete_file(info.path)
    elif info.type == FileType.Directory:
        filesystem.delete_dir(info.path)
