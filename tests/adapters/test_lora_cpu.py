"""The CPU kernel of single rows beside a slow loop over rows, and the batched products that stand in for it."""

from __future__ import annotations

import pytest
import torch

from adapters.lora import RowSlots, SlotTable, _add_rows, _add_run
from tests.adapters.lora_mixes import MIXES, one_by_one, random_table, rows_of

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def by_products(table: SlotTable, rows: RowSlots, x: torch.Tensor, y: torch.Tensor) -> None:
    """What a device without a kernel does."""
    for run in rows.runs:
        _add_run(run, table, x[run.start : run.stop], y[run.start : run.stop])


@pytest.mark.parametrize("add", [_add_rows, by_products], ids=["kernel", "products"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_row_gets_its_own_adapter_and_no_other(mix: str, dtype: torch.dtype, add: object) -> None:
    slots = MIXES[mix]
    table, adapters = random_table(200, [4, 20, 6, 13], dtype, CPU)
    x, y = rows_of(len(slots), 200, dtype, CPU)
    expected = one_by_one(adapters, slots, x, y)
    add(table, RowSlots(slots), x, y)  # type: ignore[operator]
    torch.testing.assert_close(y.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_row_has_the_same_bits_alone_and_in_any_crowd(dtype: torch.dtype) -> None:
    table, _ = random_table(600, [4, 20, 8, 16], dtype, CPU)
    slots: list[int | None] = [0, 1, *[2] * 20, None, 3]
    x, y = rows_of(len(slots), 600, dtype, CPU)
    together = y.clone()
    _add_rows(table, RowSlots(slots), x, together)
    for row in range(len(slots)):
        alone = y[row : row + 1].clone()
        _add_rows(table, RowSlots(slots[row : row + 1]), x[row : row + 1], alone)
        assert torch.equal(alone[0], together[row]), f"row {row}"


def test_what_lies_behind_an_adapter_s_own_rank_costs_nothing() -> None:
    """NaN in the padding would spoil everything it is multiplied with."""
    table, adapters = random_table(64, [4, 20], torch.float32, CPU, table_rank=40)
    for slot, rank in enumerate([4, 20]):
        table.a[slot].view(3, 40, 64)[:, rank:] = torch.nan
    x, y = rows_of(2, 64, torch.float32, CPU)
    expected = one_by_one(adapters, [0, 1], x, y)
    _add_rows(table, RowSlots([0, 1]), x, y)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
