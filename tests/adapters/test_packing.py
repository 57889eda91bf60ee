"""Packing isolates sequences exactly, forward and backward."""

from __future__ import annotations

import threading
from math import ceil

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from adapters.packing import LENGTH_STEP, PackedBatch, bounded_slices, current_pack, packed_sequences

LENGTH_MIXES = [[5, 3, 9, 1], [4, 4, 4], [7], [1, 1, 1], [2, 16, 3]]


def _heads(num_tokens: int, heads: int = 2, dim: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # [1, heads, tokens, dim] as models make it: a transposed view of [1, tokens, heads, dim]
    x = torch.randn(1, num_tokens, heads, dim, generator=generator, dtype=torch.float64)
    return x.transpose(1, 2).requires_grad_(True)


def _attend(pack: PackedBatch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return pack.unpad(scaled_dot_product_attention(pack.pad(q), pack.pad(k), pack.pad(v), is_causal=True))


def _attend_one_by_one(lengths: list[int], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    pieces, start = [], 0
    for length in lengths:
        span = slice(start, start + length)
        pieces.append(scaled_dot_product_attention(q[:, :, span], k[:, :, span], v[:, :, span], is_causal=True))
        start += length
    return torch.cat(pieces, dim=2).transpose(1, 2)


@pytest.mark.parametrize("lengths", LENGTH_MIXES)
def test_packed_attention_equals_each_sequence_alone_in_values_and_gradients(lengths: list[int]) -> None:
    inputs = [_heads(sum(lengths), seed=i) for i in range(3)]
    fast = _attend(PackedBatch(lengths), *inputs)
    slow = _attend_one_by_one(lengths, *inputs)
    weight = torch.randn_like(fast)
    fast_gradients = torch.autograd.grad((fast * weight).sum(), inputs)
    slow_gradients = torch.autograd.grad((slow * weight).sum(), inputs)
    torch.testing.assert_close(fast, slow)
    for fast_gradient, slow_gradient in zip(fast_gradients, slow_gradients, strict=True):
        torch.testing.assert_close(fast_gradient, slow_gradient)


def test_a_changed_neighbour_changes_no_bit_of_a_sequence() -> None:
    lengths = [6, 3, 8]
    q, k, v = (_heads(17, seed=i).detach() for i in range(3))
    before = _attend(PackedBatch(lengths), q, k, v)[0, :6].clone()
    for x in (q, k, v):
        x[:, :, 6:] = 1e3
    assert torch.equal(_attend(PackedBatch(lengths), q, k, v)[0, :6], before)


@pytest.mark.parametrize("lengths", LENGTH_MIXES)
def test_unpad_undoes_pad(lengths: list[int]) -> None:
    x = _heads(sum(lengths))
    pack = PackedBatch(lengths)
    width = ceil(max(lengths) / LENGTH_STEP) * LENGTH_STEP
    assert pack.pad(x).shape == (len(lengths), 2, width, 4)
    assert torch.equal(pack.unpad(pack.pad(x)), x.transpose(1, 2))


def test_positions_restart_at_every_sequence() -> None:
    assert PackedBatch([3, 1, 2]).position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]


def test_a_pack_is_seen_by_its_own_thread_only_and_nested_packs_restore_the_outer_one() -> None:
    seen: list[object] = []
    with packed_sequences([2, 2]) as outer:
        with packed_sequences([3]) as inner:
            assert current_pack() is inner
        assert current_pack() is outer
        thread = threading.Thread(target=lambda: seen.append(current_pack()))
        thread.start()
        thread.join()
    assert seen == [None]
    assert current_pack() is None


def test_an_exception_inside_a_pack_leaves_no_pack_behind() -> None:
    with pytest.raises(KeyError), packed_sequences([1]):
        raise KeyError
    assert current_pack() is None


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_a_pack_without_tokens_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        PackedBatch(lengths)


def test_slices_hold_every_sequence_once_and_stay_within_the_bound() -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 300, (200,), generator=generator).tolist()
    slices = bounded_slices(lengths, 512)
    assert sorted(i for part in slices for i in part) == list(range(200))
    for part in slices:
        assert sum(lengths[i] for i in part) <= 512
        assert max(lengths[i] for i in part) * len(part) <= 1024


def test_a_sequence_longer_than_the_bound_stands_alone() -> None:
    assert bounded_slices([900, 10, 20], 512) == [[0], [2, 1]]
