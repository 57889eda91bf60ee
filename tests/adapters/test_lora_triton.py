"""The kernel pair in Triton's interpreter, beside a slow loop over rows. tests/gpu has the same on a device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adapters.lora import BatchedLoraLinear, pack
from adapters.lora_tiles import TILE, Tile, plan_tiles, tiles_tensor
from adapters.lora_triton import add_lora
from tests.adapters.lora_mixes import MIXES, PARTS, one_by_one, random_table, rows_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the compiled kernels")
CPU = torch.device("cpu")


def test_tiles_are_runs_of_one_slot_and_leave_out_rows_without_an_adapter() -> None:
    assert plan_tiles([None, 3, 3, None, 1, 3]) == [Tile(3, 1, 2), Tile(1, 4, 1), Tile(3, 5, 1)]
    assert plan_tiles([7] * (TILE + 1)) == [Tile(7, 0, TILE), Tile(7, TILE, 1)]
    assert plan_tiles([None] * 3) == []
    assert tiles_tensor([], CPU).shape == (3, 0)


@pytest.mark.slow
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_every_row_gets_its_own_adapter_and_no_other(mix: str, dtype: torch.dtype, tolerance: float) -> None:
    slots = MIXES[mix]
    table, adapters = random_table(200, [4, 20, 8, 16], dtype, CPU)
    x, y = rows_of(len(slots), 200, dtype, CPU)
    expected = one_by_one(adapters, slots, x, y)
    add_lora(table, tiles_tensor(plan_tiles(slots), CPU), x, y)
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)


def test_features_cut_into_pieces_add_up() -> None:
    table, adapters = random_table(1100, [4, 20], torch.float32, CPU)
    x, y = rows_of(2, 1100, torch.float32, CPU)
    expected = one_by_one(adapters, [0, 1], x, y)
    add_lora(table, tiles_tensor(plan_tiles([0, 1]), CPU), x, y)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_any_crowd(dtype: torch.dtype) -> None:
    table, _ = random_table(600, [4, 20, 8, 16], dtype, CPU)
    slots: list[int | None] = [0, 1, *[2] * 20, None, 3]
    x, y = rows_of(len(slots), 600, dtype, CPU)
    together = y.clone()
    add_lora(table, tiles_tensor(plan_tiles(slots), CPU), x, together)
    for row in (0, 1, 2, 9, 20, 21, 22, 23):
        alone = y[row : row + 1].clone()
        add_lora(table, tiles_tensor(plan_tiles(slots[row : row + 1]), CPU), x[row : row + 1], alone)
        assert torch.equal(alone[0], together[row]), f"row {row}"


def test_padding_to_a_wider_rank_is_never_read() -> None:
    """NaN behind each slot's own rank would spoil everything it is multiplied with."""
    table, adapters = random_table(64, [4, 20], torch.float32, CPU, table_rank=40)
    for slot, rank in enumerate([4, 20]):
        table.a[slot].view(3, 40, 64)[:, rank:] = torch.nan
        for bank in table.banks:
            bank.b[slot, :, rank:] = torch.nan
    table.a[0].view(3, 40, 64)[1] = torch.nan  # the part that the first adapter leaves alone
    x, y = rows_of(2, 64, torch.float32, CPU)
    expected = one_by_one(adapters, [0, 1], x, y)
    add_lora(table, tiles_tensor(plan_tiles([0, 1]), CPU), x, y)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_tile_of_no_rows_changes_nothing() -> None:
    table, adapters = random_table(64, [4, 20], torch.float32, CPU)
    x, y = rows_of(2, 64, torch.float32, CPU)
    expected = one_by_one(adapters, [None, 1], x, y)
    add_lora(table, tiles_tensor([Tile(0, 0, 0), Tile(1, 1, 1), Tile(0, 0, 0)], CPU), x, y)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_slot_taken_over_by_a_narrower_adapter_forgets_the_wider_one() -> None:
    table, adapters = random_table(64, [4, 20], torch.float32, CPU)
    site = BatchedLoraLinear(nn.Identity(), 64, PARTS)
    table.load(1, pack(site, adapters[0], 8, torch.float32))
    x, y = rows_of(1, 64, torch.float32, CPU)
    expected = one_by_one(adapters, [0], x, y)
    add_lora(table, tiles_tensor(plan_tiles([1]), CPU), x, y)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
