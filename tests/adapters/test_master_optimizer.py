"""What happens to masters and learning rate when a loss explodes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from adapters.errors import TrainingError
from adapters.master_optimizer import CALM_STEPS, MasterOptimizer
from adapters.recipe import Schedule
from tests.adapters.corpora import CONFIG

STEADY = replace(CONFIG, schedule=Schedule.CONSTANT, warmup_ratio=0.0, learning_rate=1.0)


def _optimizer() -> tuple[MasterOptimizer, nn.Parameter]:
    master = nn.Parameter(torch.ones(3))
    return MasterOptimizer([master], STEADY, 1000), master


def _apply(optimizer: MasterOptimizer, master: nn.Parameter, step: int, gradient: float) -> tuple[float, bool]:
    master.grad = torch.full((3,), gradient)
    update = optimizer.apply(step, loss=1.0)
    optimizer.clear()
    return update.learning_rate, update.skipped


def test_a_bad_step_halves_the_rate_and_ten_good_ones_double_it_again() -> None:
    optimizer, master = _optimizer()
    assert _apply(optimizer, master, 0, 1.0) == (1.0, False)
    before = master.detach().clone()
    assert _apply(optimizer, master, 1, float("nan")) == (0.5, True)
    assert torch.equal(master, before)
    rates = [_apply(optimizer, master, 2 + step, 1.0)[0] for step in range(CALM_STEPS + 2)]
    assert rates == [0.5] * CALM_STEPS + [1.0] * 2


def test_bad_steps_in_a_row_halve_again_and_then_end_the_run() -> None:
    optimizer, master = _optimizer()
    assert _apply(optimizer, master, 0, float("inf"))[0] == 0.5
    assert _apply(optimizer, master, 1, float("inf"))[0] == 0.25
    with pytest.raises(TrainingError, match="not finite since step 1: try a lower learning rate"):
        _apply(optimizer, master, 2, float("inf"))


def test_a_run_that_explodes_again_and_again_is_given_up() -> None:
    optimizer, master = _optimizer()
    with pytest.raises(TrainingError, match="even at 1/256 of the learning rate") as caught:
        for step in range(100):
            _apply(optimizer, master, step, float("nan") if step % 2 else 1.0)
    assert caught.value.code == "non_finite_loss"


def test_patience_survives_a_resume() -> None:
    optimizer, master = _optimizer()
    _apply(optimizer, master, 0, 1.0)
    _apply(optimizer, master, 1, float("nan"))
    again = MasterOptimizer([master], STEADY, 1000)
    again.load_state_dict(optimizer.state_dict())
    assert again.state_dict()["num_bad_steps"] == 1
    assert _apply(again, master, 2, 1.0)[0] == 0.5
