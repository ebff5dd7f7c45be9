"""Unpack the packages that `benchmarks.gpu.pack` packed, on a machine without a network.

    export PYTHONPATH=$(python -m benchmarks.gpu.install --print-path):$PWD

Needs only Python's standard library. They go to a folder of their own, named after their archive: it appears
when it is complete, so a second call is quick, and nothing that the machine has is touched.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Unpack and print what to export."""
    options = parse_options()
    site = install(Path(options.pack), Path(options.to).expanduser())
    print(site if options.print_path else f"export PYTHONPATH={site}:{ROOT}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pack", default=ROOT / ".gpu", help="the folder that was packed; default: .gpu")
    parser.add_argument("--to", default="~/.cache/vlmray", help="where the packages' folder goes")
    parser.add_argument("--print-path", action="store_true", help="print only that folder's path")
    return parser.parse_args()


def install(pack: Path, to: Path) -> Path:
    """Unpack a pack's packages into a folder under `to`, unless they are there; return that folder.

    Raises:
        SystemExit: There is no pack, it is for another Python or platform, or its archive is damaged.
    """
    manifest = read_manifest(pack)
    archive = pack / "site.tar.xz"
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != manifest["sha256"]:
        sys.exit(f"{archive} has sha256 {digest}, the manifest {manifest['sha256']}; carry the pack again")
    site = to.resolve() / f"site-{digest[:12]}"
    if not site.exists():
        for line in find_unmet(manifest["expected"]):
            print(f"warning: {line}", file=sys.stderr)
        unpack(archive, site)
    return site


def read_manifest(pack: Path) -> dict[str, Any]:
    """Return a pack's manifest, if it is for this Python and platform."""
    try:
        manifest = json.loads((pack / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        sys.exit(f"no pack in {pack}; make one where there is a network: python -m benchmarks.gpu.pack")
    found = {"python": "{}.{}".format(*sys.version_info), "platform": sysconfig.get_platform()}
    for key, value in found.items():
        if manifest[key] != value:
            sys.exit(f"{pack} is for {key} {manifest[key]}, not {value}; pack again with --python_version")
    return manifest


def find_unmet(expected: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each package that the pack counts on and this machine lacks, or has too old or new."""
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        yield "no packaging here, so what else this machine has is not checked"
        return
    for name, specifier in expected.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield f"no {name}{specifier} here; pack again with a --present list that does not name it"
            continue
        if not SpecifierSet(specifier).contains(version, prereleases=True):
            yield f"{name} is {version}, not {specifier}; pack again with {name}=={version} in --present"


def unpack(archive: Path, site: Path) -> None:
    """Unpack an archive beside its place and rename it into place when it is complete."""
    site.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=site.parent, prefix="unpacking-") as folder:
        scratch = Path(folder) / "site"
        with tarfile.open(archive) as tar:
            try:
                tar.extractall(scratch, filter="data")
            except tarfile.FilterError as error:
                sys.exit(f"{archive} would write outside its folder: {error}; make the pack again")
        try:
            scratch.rename(site)
        except OSError:  # another process was first
            if not site.exists():
                raise


if __name__ == "__main__":
    main()
