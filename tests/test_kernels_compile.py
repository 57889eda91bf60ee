"""The CUDA kernels go through the whole compiler, which needs no device: the interpreter forgives what it would not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_MEMORY = 99 * 1024
"""What a program may use on the smallest devices of interest; an H200 has 227 KiB."""


@pytest.mark.slow
def test_every_kernel_compiles_for_a_device_and_fits_into_its_shared_memory(tmp_path: Path) -> None:
    environ = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiled_kernels"], env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _, _ in compiled} == {"_shrink", "_expand", "_store", "_attend_split", "_merge"}
    assert all(int(shared) <= SHARED_MEMORY for _, _, shared in compiled), done.stdout
