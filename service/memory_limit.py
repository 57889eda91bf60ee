"""How much memory the container may use, from its control group. Knows no process and no metric."""

from __future__ import annotations

from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")
FILES = ("memory.max", "memory/memory.limit_in_bytes")
"""Of control groups v2 and v1."""
UNLIMITED_BYTES = 1 << 60
"""v1 says "no limit" with a number near 2^63."""


def memory_limit_bytes(control_groups: Path = CONTROL_GROUPS) -> int | None:
    """None where there is no limit, or none that can be read."""
    for name in FILES:
        try:
            limit = int((control_groups / name).read_text())
        except (OSError, ValueError):  # v2 says "max"
            continue
        if limit < UNLIMITED_BYTES:
            return limit
    return None
