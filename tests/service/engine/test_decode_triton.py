"""The decode kernels in Triton's interpreter, beside the CPU's matrix products. tests/gpu has the same on a device."""

from __future__ import annotations

import pytest
import torch

from service.engine.decode_triton import TritonDecoding
from tests.service.engine.decode_mixes import LENGTHS, SHAPES, Rows

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the compiled kernels")
CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_every_row_sees_its_own_keys_and_all_of_them(shape: str) -> None:
    rows = Rows(SHAPES[shape], torch.float32, CPU)
    torch.testing.assert_close(rows.fast(TritonDecoding()), rows.reference(), atol=2e-6, rtol=2e-6)


@pytest.mark.slow
def test_bfloat16_is_summed_in_float32() -> None:
    rows = Rows(SHAPES["grouped"], torch.bfloat16, CPU)
    torch.testing.assert_close(rows.fast(TritonDecoding()), rows.reference(), atol=2e-2, rtol=2e-2)


def test_the_new_key_and_value_lie_where_the_reference_puts_them() -> None:
    rows = Rows(SHAPES["odd sizes"], torch.float32, CPU)
    before = rows.cache.layers[0].keys.clone()
    rows.reference()
    expected = [buffer.clone() for buffer in (rows.cache.layers[0].keys, rows.cache.layers[0].values)]
    rows = Rows(SHAPES["odd sizes"], torch.float32, CPU)
    rows.fast(TritonDecoding())
    assert not torch.equal(before, expected[0])
    assert torch.equal(rows.cache.layers[0].keys, expected[0])
    assert torch.equal(rows.cache.layers[0].values, expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["grouped", "both"])
def test_a_row_has_the_same_bits_alone_and_in_any_crowd(shape: str) -> None:
    rows = Rows(SHAPES[shape], torch.float32, CPU)
    together = rows.fast(TritonDecoding())
    shuffled = rows.fast(TritonDecoding(), [2, 0, 3, 1])
    for place, row in enumerate([2, 0, 3, 1]):
        assert torch.equal(shuffled[place], together[row])
    for row in (1, 3):
        assert torch.equal(rows.fast(TritonDecoding(), [row])[0], together[row])


@pytest.mark.slow
def test_a_row_that_only_pads_stores_nothing_and_is_zero() -> None:
    rows = Rows(SHAPES["multi-head"], torch.float32, CPU)
    together = rows.fast(TritonDecoding())
    cached = rows.cache.layers[0].keys.clone()
    padded = rows.fast(TritonDecoding(), pads=2)
    assert torch.equal(padded[: len(LENGTHS)], together)
    assert not padded[len(LENGTHS) :].any()
    assert torch.equal(rows.cache.layers[0].keys, cached)
