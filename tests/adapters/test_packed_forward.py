"""Rows in one forward: each as if it were alone, logits only where they are asked for."""

from __future__ import annotations

import pytest
import torch

from adapters.memory_budget import MemoryBudget
from adapters.packed_forward import PackedForward
from adapters.packed_model import COARSE_FROM, COARSE_STEP, FINE_STEP, AskedRows
from tests.adapters.conftest import GraftedBase

CPU = torch.device("cpu")


def _row(start: int, length: int, asked: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.zeros(length, dtype=torch.bool)
    mask[asked] = True
    return torch.arange(start, start + length, dtype=torch.int32), mask


def test_rows_of_a_pack_do_not_see_each_other_in_the_whole_model(grafted: GraftedBase) -> None:
    forward = PackedForward(grafted.model, CPU, MemoryBudget(100))
    row, neighbour, other = _row(5, 9, [3, 8]), _row(40, 6, [1]), _row(90, 6, [1])
    with torch.no_grad():
        before, _ = forward([row, neighbour], None)
        after, labels = forward([row, other], None)
        alone, _ = forward([row], None)
    assert labels.tolist() == [8, 13, 91]
    assert torch.equal(before[:2], after[:2])
    assert not torch.equal(before[2], after[2])
    torch.testing.assert_close(alone, before[:2])


def test_logits_are_those_of_the_plain_model_where_they_are_asked_for(grafted: GraftedBase) -> None:
    forward = PackedForward(grafted.model, CPU, MemoryBudget(100))
    rows = [_row(5, 9, [3, 8]), _row(40, 6, [1]), _row(60, 4, [0])]  # nothing stands before a first token
    with torch.no_grad():
        logits, labels = forward(rows, None)
        slow = [grafted.model(input_ids=tokens[None].long(), use_cache=False).logits[0] for tokens, _ in rows]
    assert labels.tolist() == [8, 13, 41]
    torch.testing.assert_close(logits, torch.stack([slow[0][2], slow[0][7], slow[1][0]]))


@pytest.mark.parametrize("lengths", [[9, 6], [100, 100, 90], [17]])
def test_packs_are_filled_to_round_sizes_with_tokens_that_nobody_sees(lengths: list[int]) -> None:
    rows = [_row(5, length, [length - 1]) for length in lengths]
    asked = AskedRows.of(rows, CPU)
    num_tokens = sum(lengths) - len(lengths)
    assert len(asked.tokens) % (FINE_STEP if num_tokens < COARSE_FROM else COARSE_STEP) == 0
    assert sum(asked.lengths) == len(asked.tokens) < num_tokens + COARSE_STEP
    assert max(asked.positions.tolist()) < num_tokens, "no prediction is asked of the filler"
    assert asked.lengths[: len(lengths)] == [length - 1 for length in lengths]
