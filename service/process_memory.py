"""How much memory a process holds, as the kernel tells. Knows no process of the service."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes(processes: Mapping[str, int | None]) -> dict[str, int]:
    """By name, from process ids; what has ended, or is told by no /proc, is left out."""
    found = {}
    for name, pid in processes.items():
        if pid is None:
            continue
        try:
            found[name] = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
        except OSError:
            continue
    return found
