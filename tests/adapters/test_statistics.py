"""Resampled intervals and paired tests against loops over the definition."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from adapters.statistics import (
    MAX_EXACT,
    NUM_RESAMPLES,
    NUM_SWAPS,
    Resampling,
    mean_rows,
    proportion,
    ratio,
    smallest_p,
)


def _values(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).random(count)


def test_the_exact_p_is_that_of_trying_every_exchange_one_by_one() -> None:
    mine, other = _values(1, 7), _values(2, 7)
    gain = mine.mean() - other.mean()
    num_as_far = 0
    for swaps in product([False, True], repeat=7):
        a = [o if swap else m for m, o, swap in zip(mine, other, swaps, strict=True)]
        b = [m if swap else o for m, o, swap in zip(mine, other, swaps, strict=True)]
        num_as_far += abs(np.mean(a) - np.mean(b)) >= abs(gain) - 1e-12
    found = Resampling(7, seed=0).compare(mean_rows(mine), mean_rows(other), ratio)
    assert found.gain == pytest.approx(gain)
    assert found.p == num_as_far / 2**7


def test_the_sampled_p_lies_near_the_exact_one() -> None:
    count = MAX_EXACT + 3
    mine, other = _values(1, count) + 0.25, _values(2, count)
    signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
    differences = mine - other
    exact = np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12)
    found = Resampling(count, seed=0).compare(mean_rows(mine), mean_rows(other), ratio)
    assert found.p == pytest.approx(exact, abs=0.01)
    assert 0.005 < found.p < 0.5


def test_the_interval_is_that_of_resampling_in_a_loop() -> None:
    values = np.random.default_rng(3).random(60) ** 3
    draw = np.random.default_rng(99)
    means = [values[draw.integers(0, 60, 60)].mean() for _ in range(NUM_RESAMPLES)]
    found = Resampling(60, seed=0).estimate(mean_rows(values), ratio)
    assert found.value == pytest.approx(values.mean())
    low, high = np.percentile(means, [2.5, 97.5])
    assert found.low == pytest.approx(low, abs=0.015)
    assert found.high == pytest.approx(high, abs=0.015)


def test_the_interval_of_a_mean_covers_the_truth_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(5)
    covered = 0
    for trial in range(60):
        found = Resampling(50, seed=trial).estimate(mean_rows(draw.random(50)), ratio)
        covered += found.low <= 0.5 <= found.high
    assert 50 <= covered < 60


def test_equal_contestants_are_rarely_called_different() -> None:
    draw = np.random.default_rng(6)
    calls = [
        Resampling(30, seed=t).compare(mean_rows(draw.random(30)), mean_rows(draw.random(30)), ratio).p <= 0.05
        for t in range(60)
    ]
    assert 1 <= sum(calls) <= 8


def test_the_same_seed_gives_the_same_figures_and_another_does_not() -> None:
    rows = mean_rows(_values(1, 40))
    first, again, other = (Resampling(40, seed=seed).estimate(rows, ratio) for seed in (7, 7, 8))
    assert first == again != other


def test_a_gain_in_a_loss_is_a_fall() -> None:
    low, high = mean_rows(np.full(20, 1.0)), mean_rows(np.full(20, 3.0))
    found = Resampling(20, seed=0).compare(low, high, ratio, higher_is_better=False)
    assert (found.gain, found.low, found.high) == (2.0, 2.0, 2.0)
    assert found.p == pytest.approx(1 / (NUM_SWAPS + 1))


def test_two_that_never_differ_have_p_1() -> None:
    rows = mean_rows(_values(1, 30))
    assert Resampling(30, seed=0).compare(rows, rows, ratio).p == 1.0


@pytest.mark.parametrize("count", [1, 4, 5, 6, MAX_EXACT])
def test_the_smallest_p_is_what_a_clean_sweep_reaches(count: int) -> None:
    found = Resampling(count, seed=0).compare(mean_rows(np.ones(count)), mean_rows(np.zeros(count)), ratio)
    assert found.p == smallest_p(count)


def test_few_successes_have_wilsons_interval() -> None:
    found = proportion(np.array([1.0] * 8 + [0.0] * 2))
    assert found.value == 0.8
    assert found.low == pytest.approx(0.4902, abs=1e-4)
    assert found.high == pytest.approx(0.9433, abs=1e-4)
    sure = proportion(np.ones(5))
    assert (sure.value, sure.high) == (1.0, 1.0)
    assert sure.low == pytest.approx(0.5655, abs=1e-4)


def test_a_mean_of_shares_has_an_interval_within_0_and_1() -> None:
    found = proportion(np.array([0.9, 1.0, 0.95, 0.99, 0.4]))
    assert 0 <= found.low < found.value < found.high <= 1.0
