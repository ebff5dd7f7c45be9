"""Wheels for another machine, and an archive of what of them travels: what runs, not what compilers read."""

from __future__ import annotations

import hashlib
import json
import lzma
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path, PurePosixPath

from packaging.utils import parse_wheel_filename

MIB = 2**20
GLIBC = 34  # wheels built for glibc 2.34 or older
DROPPED_FOLDERS = {"__pycache__", "tests"}
DROPPED_SUFFIXES = {".c", ".cc", ".cpp", ".cu", ".h", ".hpp", ".map", ".pxd", ".pxi", ".pyc", ".pyi", ".pyx"}
DROPPED_PATHS = re.compile(
    r"ray/(rllib|jars|cpp|llm)/"
    # The dashboard serves these files to browsers only, but ends if build/static/ does not exist: css/ stays.
    r"|ray/dashboard/client/build/(speedscope[^/]*|static/js|static/media)/"
    r"|bitsandbytes/libbitsandbytes_(?!cpu\.)"
)


def fetch_wheel(name: str, version: str, python_version: str, folder: Path) -> Path:
    """Return the wheel for the target from `folder`, where it is downloaded to or built if it isn't there."""
    if found := find_wheel(name, version, folder):
        return found
    requirement = f"{name}=={version}"
    print(f"fetching {requirement}", file=sys.stderr)
    # pip takes a platform literally: under manylinux_2_28 it does not find wheels for older systems.
    tags = [f"manylinux_2_{minor}_x86_64" for minor in range(5, GLIBC + 1)]
    tags += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python_version}"]
    target += [f"--platform={tag}" for tag in tags]
    reason = _run_pip("download", f"--dest={folder}", *target, requirement)
    if reason:  # perhaps there is only source, which serves any machine if it is pure Python
        _run_pip("wheel", f"--wheel-dir={folder}", requirement)
    found = find_wheel(name, version, folder)
    if found and reason and not found.name.endswith("-none-any.whl"):
        found.unlink()
        found = None
    return found or sys.exit(f"no wheel of {requirement} for Python {python_version}: {reason}")


def find_wheel(name: str, version: str, folder: Path) -> Path | None:
    """Return the wheel of that version in a folder, None if there is none."""
    for path in folder.glob("*.whl"):
        if [str(part) for part in parse_wheel_filename(path.name)[:2]] == [name, version]:
            return path
    return None


def _run_pip(*arguments: str) -> str:
    """Run pip without dependencies; return its last error, empty if it went well."""
    pip = [sys.executable, "-m", "pip", arguments[0], "--quiet", "--no-deps", *arguments[1:]]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    return (done.stderr.strip() or "pip failed").splitlines()[-1] if done.returncode else ""


def is_kept(path: str, cuda: str) -> bool:
    """Tell whether a file, by its path under site-packages, travels to a machine with that CUDA ("130")."""
    if path.startswith(f"bitsandbytes/libbitsandbytes_cuda{cuda}."):
        return True
    pure = PurePosixPath(path)
    return not (
        DROPPED_FOLDERS.intersection(pure.parts[:-1])
        or pure.suffix in DROPPED_SUFFIXES
        or DROPPED_PATHS.match(path)
    )


def read_wheel(path: Path, cuda: str) -> dict[str, zipfile.ZipInfo]:
    """Return the files of a wheel that travel, by their paths under site-packages; scripts go to bin/."""
    members = {}
    with zipfile.ZipFile(path) as wheel:
        for member in wheel.infolist():
            name = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", member.filename)
            name = re.sub(r"^[^/]+\.data/scripts/", "bin/", name)
            elsewhere = re.match(r"[^/]+\.data/", name)  # headers, manual pages
            if not member.is_dir() and not elsewhere and is_kept(name, cuda):
                members[name] = member
    return members


def archive_site(wheels: Iterable[Path], cuda: str, folder: Path) -> Path:
    """Return a tar.xz of what travels of these wheels, made once for the same wheels and rules."""
    wheels = sorted(wheels)
    rules = [cuda, sorted(DROPPED_FOLDERS), sorted(DROPPED_SUFFIXES), DROPPED_PATHS.pattern]
    recipe = json.dumps([rules, [wheel.name for wheel in wheels]])
    path = folder / f"site-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.tar.xz"
    if not path.exists():
        print(f"compressing {len(wheels)} packages: minutes", file=sys.stderr)
        partial = path.with_suffix(".partial")
        write_site(wheels, cuda, partial)
        partial.rename(path)
    return path


def write_site(wheels: Iterable[Path], cuda: str, path: Path) -> None:
    """Write a tar.xz of what travels of these wheels; the same wheels give the same bytes."""
    # The filter makes machine code 5 % smaller; the dictionary is as long as Ray's three binaries together.
    filters = [
        {"id": lzma.FILTER_X86},
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 128 * MIB},
    ]
    with lzma.open(path, "wb", filters=filters) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as source:
                for name, member in sorted(read_wheel(wheel, cuda).items()):
                    info = tarfile.TarInfo(name)
                    info.size, info.mode = member.file_size, (member.external_attr >> 16) & 0o777 or 0o644
                    tar.addfile(info, BytesIO(source.read(member)))
