"""The CPU kernel of single rows beside a slow loop over rows, and the batched products that stand in for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapters.lora import Chunk, Chunks, RowSlots, _add_compiled, _add_products
from tests.adapters.lora_mixes import MIXES, one_by_one, random_table, rows_of

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
PATHS = pytest.mark.parametrize("add", [_add_compiled, _add_products], ids=["kernel", "products"])
Add = Callable[..., None]


@PATHS
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_row_gets_its_own_adapter_and_no_other(mix: str, dtype: torch.dtype, add: Add) -> None:
    slots = MIXES[mix]
    table, adapters = random_table(200, [4, 20, 6, 13], dtype, CPU, table_rank=24)
    x, y = rows_of(len(slots), 200, dtype, CPU)
    expected = one_by_one(adapters, slots, x, y)
    add(table, None, RowSlots(slots), x, y)
    torch.testing.assert_close(y.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@PATHS
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_chunks_of_any_length_stand_before_the_single_rows(dtype: torch.dtype, add: Add) -> None:
    table, adapters = random_table(200, [4, 20, 6, 13], dtype, CPU, table_rank=24)
    chunks = Chunks([Chunk(0, 7, 3), Chunk(9, 10, 1), Chunk(10, 14, 2)])
    single: list[int | None] = [None, 2, 0]
    slots = [3] * 7 + [None] * 2 + [1] + [2] * 4 + single
    x, y = rows_of(len(slots), 200, dtype, CPU)
    expected = one_by_one(adapters, slots, x, y)
    add(table, chunks, RowSlots(single, 14), x, y)
    torch.testing.assert_close(y.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_row_and_a_chunk_have_the_same_bits_alone_and_in_any_crowd(dtype: torch.dtype) -> None:
    table, _ = random_table(600, [4, 20, 8, 16], dtype, CPU, table_rank=24)
    slots: list[int | None] = [0, 1, *[2] * 20, None, 3]
    x, y = rows_of(6 + len(slots), 600, dtype, CPU)
    together = y.clone()
    _add_compiled(table, Chunks([Chunk(0, 6, 1)]), RowSlots(slots, 6), x, together)
    for row, slot in enumerate(slots, 6):
        alone = y[row : row + 1].clone()
        _add_compiled(table, None, RowSlots([slot]), x[row : row + 1], alone)
        assert torch.equal(alone[0], together[row]), f"row {row}"
    alone = y[:6].clone()
    _add_compiled(table, Chunks([Chunk(0, 6, 1)]), RowSlots([]), x[:6], alone)
    assert torch.equal(alone, together[:6])


def test_what_lies_behind_an_adapter_s_own_rank_costs_nothing() -> None:
    """NaN in the padding would spoil everything it is multiplied with."""
    table, adapters = random_table(64, [4, 20], torch.float32, CPU, table_rank=40)
    for slot, rank in enumerate([4, 20]):
        table.a[slot].view(3, 40, 64)[:, rank:] = torch.nan
    slots: list[int | None] = [1, 1, 1, 0, 1]
    x, y = rows_of(5, 64, torch.float32, CPU)
    expected = one_by_one(adapters, slots, x, y)
    _add_compiled(table, Chunks([Chunk(0, 3, 1)]), RowSlots([0, 1], 3), x, y)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_new_and_kept_kernels_and_two_threads_give_the_same_bits(tmp_path: Path) -> None:
    """A service that has just compiled its kernels answers as it does after the next start."""

    def bits(threads: int) -> str:
        environ = {**os.environ, "NUMBA_NUM_THREADS": str(threads), "NUMBA_CACHE_DIR": str(tmp_path)}
        child = [sys.executable, "-m", "tests.kernel_bits"]
        done = subprocess.run(child, env=environ, capture_output=True, text=True, timeout=300, check=True)
        number, digest = done.stdout.split()
        assert number == str(threads)
        return digest

    new = bits(1)
    assert bits(1) == new
    assert bits(2) == new
