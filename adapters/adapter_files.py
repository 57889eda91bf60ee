"""An adapter's files as bytes in memory: what was verified is what is parsed. Knows no format and no store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

AdapterFiles = Mapping[str, bytes]
"""Name -> content."""

AdapterSource = Path | AdapterFiles
"""A directory that nobody else writes to, or files that were read already."""


def is_file(source: AdapterSource, name: str) -> bool:
    return (source / name).is_file() if isinstance(source, Path) else name in source


def names(source: AdapterSource) -> set[str]:
    return {path.name for path in source.iterdir()} if isinstance(source, Path) else set(source)


def content(source: AdapterSource, name: str) -> bytes:
    """Raises FileNotFoundError."""
    if isinstance(source, Path):
        return (source / name).read_bytes()
    if name not in source:
        raise FileNotFoundError(name)
    return source[name]
