"""What /proc says of a process and its children: memory, handles, threads. Knows no service. Linux only."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MIB = 1024 * 1024


@dataclass(frozen=True)
class Picture:
    """Of one process. `handles` are open descriptors by kind: socket, pipe, database, file, other."""

    pid: int
    memory_mib: float
    handles: Counter[str]
    num_threads: int


def picture(pid: int) -> Picture | None:
    """None when there is no such process (any more)."""
    try:
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        handles = Counter(_kind(target) for target in _targets(pid))
    except (FileNotFoundError, ProcessLookupError):
        return None
    if "RssAnon" not in status:  # a zombie has no memory
        return None
    anonymous = sum(int(status[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
    return Picture(pid, anonymous / MIB, handles, int(status["Threads"]))


def children(pid: int) -> list[int]:
    """Of all its threads, zombies too."""
    found: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with suppress(FileNotFoundError, ProcessLookupError):
                found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_alive(pid: int) -> bool:
    """Zombies are not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _targets(pid: int) -> Iterator[str]:
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            yield os.readlink(f"/proc/{pid}/fd/{name}")


def _kind(target: str) -> str:
    if ".db" in target:
        return "database"
    for kind in ("socket:", "pipe:"):
        if target.startswith(kind):
            return kind[:-1]
    return "file" if target.startswith("/") and not target.startswith("/dev/") else "other"
