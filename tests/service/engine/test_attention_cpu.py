"""The CPU's decode attention beside the batched products it replaces."""

from __future__ import annotations

import pytest
import torch

from tests.service.engine.decode_mixes import LENGTHS, SHAPES, Rows

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_every_row_sees_its_own_keys_and_all_of_them(shape: str, dtype: torch.dtype, tolerance: float) -> None:
    rows = Rows(SHAPES[shape], dtype, CPU)
    torch.testing.assert_close(rows.reference(compiled=True), rows.reference(), atol=tolerance, rtol=tolerance)


def test_the_new_key_and_value_lie_where_the_reference_puts_them() -> None:
    stored = []
    for compiled in (False, True):
        rows = Rows(SHAPES["odd sizes"], torch.float32, CPU)
        before = rows.cache.layers[0].keys.clone()
        rows.reference(compiled)
        assert not torch.equal(rows.cache.layers[0].keys, before)
        stored.append((rows.cache.layers[0].keys, rows.cache.layers[0].values))
    assert all(torch.equal(a, b) for a, b in zip(*stored, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_any_crowd(dtype: torch.dtype) -> None:
    rows = Rows(SHAPES["grouped"], dtype, CPU)
    together = rows.reference(compiled=True)
    for index in range(len(LENGTHS)):
        alone = rows.only([index]).reference(compiled=True)
        assert torch.equal(alone[0], together[index])
