"""The container's memory limit, as the kernel writes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.memory_limit import memory_limit_bytes


@pytest.mark.parametrize(
    ("name", "text", "limit"),
    [
        ("memory.max", "4294967296\n", 1 << 32),
        ("memory.max", "max\n", None),
        ("memory/memory.limit_in_bytes", "1073741824\n", 1 << 30),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", None),
    ],
)
def test_a_limit_is_read_from_either_version_of_control_groups(
    tmp_path: Path, name: str, text: str, limit: int | None
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert memory_limit_bytes(tmp_path) == limit


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert memory_limit_bytes(tmp_path / "nowhere") is None
