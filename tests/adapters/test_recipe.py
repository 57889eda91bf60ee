"""What "auto" becomes, and the learning rate over a run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapters.recipe import (
    Schedule,
    TrainConfig,
    auto_batch_size,
    auto_epochs,
    auto_eval_every,
    auto_learning_rate,
    learning_rate_factor,
    num_steps,
    steps_per_epoch,
)


@pytest.mark.parametrize("num_parameters", [7e6, 8e9])
@pytest.mark.parametrize("num_examples", [10, 37, 100, 999, 3000, 12_000, 25_000])
def test_examples_times_epochs_stay_within_what_practitioners_agree_on(
    num_examples: int, num_parameters: float
) -> None:
    epochs = auto_epochs(num_examples, num_parameters)
    assert 100 <= num_examples * epochs <= 25_000


@pytest.mark.parametrize(
    ("num_examples", "num_parameters", "epochs"),
    [(10, 8e9, 10), (500, 8e9, 3), (500, 7e6, 8), (3000, 7e6, 8), (1_000_000, 8e9, 1)],
)
def test_small_models_see_their_examples_more_often(num_examples: int, num_parameters: float, epochs: int) -> None:
    assert auto_epochs(num_examples, num_parameters) == epochs


@pytest.mark.parametrize(("num_examples", "batch_size"), [(4, 1), (10, 2), (100, 8), (3000, 16)])
def test_a_batch_leaves_an_epoch_some_steps(num_examples: int, batch_size: int) -> None:
    assert auto_batch_size(num_examples) == batch_size


def test_the_learning_rate_falls_with_the_size_of_the_model() -> None:
    assert auto_learning_rate(7e6) == pytest.approx(2e-3)
    assert auto_learning_rate(1e8) == pytest.approx(2e-3)
    assert auto_learning_rate(10**8.5) == pytest.approx((2e-3 * 2e-4) ** 0.5)
    assert auto_learning_rate(1e9) == pytest.approx(2e-4)
    assert auto_learning_rate(70e9) == pytest.approx(2e-4)


@pytest.mark.parametrize(("num_steps", "every"), [(3, 1), (40, 2), (1500, 75)])
def test_a_run_is_evaluated_about_twenty_times(num_steps: int, every: int) -> None:
    assert auto_eval_every(num_steps, num_valid=4, batch_size=16) == every


def test_many_validation_examples_are_scored_less_often_but_at_least_once() -> None:
    assert auto_eval_every(90, num_valid=30, batch_size=8) == 9
    assert auto_eval_every(90, num_valid=10_000, batch_size=8) == 90


@pytest.mark.parametrize("num_steps", [1, 2, 7, 100])
def test_the_learning_rate_rises_for_a_twentieth_then_falls_and_never_is_zero(num_steps: int) -> None:
    factors = [learning_rate_factor(Schedule.LINEAR, step, num_steps, 0.05) for step in range(num_steps)]
    peak = factors.index(max(factors))
    assert factors[peak] == 1.0
    assert peak <= max(1, round(0.05 * num_steps))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert min(factors) > 0


def test_the_last_batch_of_an_epoch_counts() -> None:
    assert [steps_per_epoch(n, 8) for n in (1, 8, 9)] == [1, 1, 2]


def test_a_cosine_falls_slowly_then_fast_and_a_constant_stays() -> None:
    cosine = [learning_rate_factor(Schedule.COSINE, step, 100, 0.1) for step in range(100)]
    linear = [learning_rate_factor(Schedule.LINEAR, step, 100, 0.1) for step in range(100)]
    assert cosine[:11] == linear[:11] == pytest.approx([*(step / 10 for step in range(1, 11)), 1.0])
    assert cosine[30] > linear[30] and cosine[80] < linear[80]
    assert cosine[55] == pytest.approx(0.5)
    assert 0 < cosine[-1] < linear[-1]
    assert [learning_rate_factor(Schedule.CONSTANT, step, 100, 0.1) for step in (9, 10, 99)] == [1.0, 1.0, 1.0]


def test_a_run_may_be_cut_short() -> None:
    config = TrainConfig(num_epochs=3, batch_size=4, learning_rate=1.0, seed=0, eval_every=1)
    assert num_steps(config, 10) == 9
    assert num_steps(replace(config, max_steps=5), 10) == 5
