"""Writes requirements.lock: the exact version of everything pyproject.toml asks for, directly or not.

Reads what is installed beside this interpreter; knows no index and installs nothing. The local part of a
version (`+cpu`, `+cu130`) is left out, so that one lock serves every build of torch; that is also why the
lock carries no hashes.
"""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
HEADER = """\
# Every package of Rootstock and of its extras, exactly pinned. Written by `make lock`; do not edit.
# torch has no local label here: pip takes the CPU or the CUDA build, whichever the index in use offers.
"""


def project_requirements() -> list[Requirement]:
    """What pyproject.toml asks for: to run, to build, and every extra."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = document["project"]
    groups = [project["dependencies"], document["build-system"]["requires"]]
    groups += project["optional-dependencies"].values()
    return [Requirement(line) for group in groups for line in group]


def closure(requirements: list[Requirement]) -> dict[str, Version]:
    """Installed versions of `requirements` and of all they need. Raises SystemExit naming what is amiss."""
    pinned: dict[str, Version] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    pending = list(requirements)
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in seen or not _applies(requirement):
            continue
        seen.add(key)
        pinned[name] = _installed(requirement)
        needed = [Requirement(line) for line in distribution(name).requires or []]
        pending += [_under(child, requirement.extras) for child in needed if not (name == "torch" and _exact(child))]
    return pinned


def _exact(requirement: Requirement) -> bool:
    """torch's CUDA build pins its own libraries, which its CPU build does not have."""
    return any(specifier.operator == "==" for specifier in requirement.specifier)


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _under(requirement: Requirement, extras: set[str]) -> Requirement:
    """`requirement` without its marker if one of the parent's `extras` switches it on."""
    marker = requirement.marker
    if marker is not None and any(marker.evaluate({"extra": extra}) for extra in extras):
        requirement.marker = None
    return requirement


def _installed(requirement: Requirement) -> Version:
    try:
        version = Version(distribution(requirement.name).version)
    except PackageNotFoundError:
        sys.exit(f"{requirement} is not installed: pip install -e '.[dev,postgres,s3]', then again")
    if not requirement.specifier.contains(version.public, prereleases=True):
        sys.exit(f"{requirement.name} {version} is installed, but {requirement} is asked for")
    return version


def main() -> None:
    """Write the lock and say how many packages it pins."""
    pinned = closure(project_requirements())
    lines = [f"{name}=={version.public}\n" for name, version in sorted(pinned.items())]
    LOCK.write_text(HEADER + "".join(lines), encoding="utf-8")
    print(f"{LOCK.name}: {len(lines)} packages")


if __name__ == "__main__":
    main()
