"""The compiled kernels on a device, beside the slow references that the interpreter's tests use."""

from __future__ import annotations

import pytest
import torch

from adapters.lora_tiles import plan_tiles, tiles_tensor
from adapters.lora_triton import add_lora
from service.engine.decode_triton import TritonDecoding
from tests.adapters.lora_mixes import MIXES, one_by_one, random_table, rows_of
from tests.service.engine.decode_mixes import LENGTHS, SHAPES, Rows

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("in_features", [200, 4096])
@pytest.mark.parametrize("ranks", [[4, 8, 16, 32], [64, 4, 20, 48], [8, 8, 8, 8]])
def test_every_row_gets_its_own_adapter(mix: str, dtype: torch.dtype, in_features: int, ranks: list[int]) -> None:
    slots = MIXES[mix]
    table, adapters = random_table(in_features, ranks, dtype, CUDA)
    x, y = rows_of(len(slots), in_features, dtype, CUDA)
    expected = one_by_one(adapters, slots, x, y)
    add_lora(table, tiles_tensor(plan_tiles(slots), CUDA), x, y)
    torch.testing.assert_close(y.double().cpu(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_lora_gives_a_row_the_same_bits_alone_and_in_any_crowd(dtype: torch.dtype) -> None:
    table, _ = random_table(4096, [4, 20, 64, 16], dtype, CUDA)
    slots: list[int | None] = [0, 1, *[2] * 100, None, *[3] * 5]
    x, y = rows_of(len(slots), 4096, dtype, CUDA)
    together = y.clone()
    add_lora(table, tiles_tensor(plan_tiles(slots), CUDA), x, together)
    for row in range(len(slots)):
        alone = y[row : row + 1].clone()
        add_lora(table, tiles_tensor(plan_tiles(slots[row : row + 1]), CUDA), x[row : row + 1], alone)
        assert torch.equal(alone[0], together[row]), f"row {row}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_every_row_sees_its_own_keys(shape: str, dtype: torch.dtype, tolerance: float) -> None:
    rows = Rows(SHAPES[shape], dtype, CUDA)
    torch.testing.assert_close(rows.fast(TritonDecoding()), rows.reference(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_gives_a_row_the_same_bits_alone_and_in_any_crowd(shape: str) -> None:
    rows = Rows(SHAPES[shape], torch.bfloat16, CUDA)
    together = rows.fast(TritonDecoding(), pads=3)
    assert not together[len(LENGTHS) :].any()
    for row in range(len(LENGTHS)):
        assert torch.equal(rows.fast(TritonDecoding(), [row])[0], together[row])
