"""Memory that nobody uses goes back to the system."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from adapters.host_memory import give_back


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc and glibc")
def test_what_is_free_inside_the_heap_is_given_back() -> None:
    blocks = [bytearray(100_000) for _ in range(1000)]  # below the size that the allocator maps on its own
    kept = blocks[::50]  # hold the heap together
    blocks.clear()
    before = _resident_bytes()
    give_back()
    assert before - _resident_bytes() > 50_000_000
    assert len(kept) == 20


def _resident_bytes() -> int:
    fields = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()
    return int(fields[0]) * 1024
