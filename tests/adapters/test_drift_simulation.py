"""Simulated streams: their statistics against slow ones, and that they behave as new observations do."""

from __future__ import annotations

import numpy as np
import pytest

from adapters.drift.cusum import MIN_SAMPLES, Cusum, EventSteps, cusum_paths, rank_score
from adapters.drift.mmd import kernel, median_bandwidth, mmd2
from adapters.drift.simulation import Draws, event_paths, number_paths, window_paths, without_self_similarity
from tests.adapters.drifting import nothing, vectors


def test_window_paths_are_the_mmd2_of_the_drawn_points() -> None:
    rng = np.random.default_rng(0)
    pool = vectors(rng, 30)
    square = kernel(pool, pool, median_bandwidth(pool))
    draws = Draws.of(rng, 30, 3, 25)
    paths = window_paths(square, draws, (4, 8), nothing)
    imputed = without_self_similarity(square).astype(np.float64)

    def pairs(indices: np.ndarray) -> float:
        num = len(indices)
        return float(np.mean([imputed[indices[i], indices[j]] for i in range(num) for j in range(num) if i != j]))

    for row in range(3):
        reference = draws.reference[row]
        for t in (7, 8, 24):
            for window in (4, 8):
                last = draws.stream[row, t + 1 - window : t + 1]
                slow = pairs(reference) + pairs(last) - 2 * imputed[np.ix_(reference, last)].mean()
                assert paths[window][row, t] == pytest.approx(slow, abs=1e-5)
        assert np.isneginf(paths[8][row, :7]).all()


def test_drawn_streams_spread_as_streams_of_new_points_do() -> None:
    """With the self-similarity of the pool's points left in, the spread is too large."""
    rng = np.random.default_rng(0)
    points = [vectors(rng, 64) for _ in range(60)]
    bandwidth = median_bandwidth(points[0])
    new = np.std([mmd2(some, vectors(rng, 32), bandwidth) for some in points for _ in range(8)])
    drawn, naive = [], []
    for some in points:
        square = kernel(some, some, bandwidth)
        drawn.append(window_paths(square, Draws.of(rng, 64, 8, 32), (32,), nothing)[32][:, -1])
        picked = rng.integers(64, size=(8, 2, 64))
        naive += [mmd2(some[ref], some[stream[:32]], bandwidth) for ref, stream in picked]
    assert np.std(drawn) == pytest.approx(new, rel=0.1)
    assert np.std(naive) > 1.1 * new


def test_the_sums_of_many_streams_are_those_of_one() -> None:
    steps = np.random.default_rng(0).standard_normal((4, 60))
    paths = cusum_paths(steps - 0.3, -steps - 0.3)
    for row in range(4):
        one = Cusum(cap=np.inf)
        for t, step in enumerate(steps[row], 1):
            one.add(step - 0.3, -step - 0.3)
            expected = one.statistic if t >= MIN_SAMPLES else -np.inf
            assert paths[row, t - 1] == pytest.approx(expected, rel=1e-5)


def test_a_sum_stops_at_its_cap_so_that_it_comes_down_again() -> None:
    one = Cusum(cap=4.0)
    for _ in range(100):
        one.add(1.0, -1.0)
    assert one.statistic == 4.0
    one.add(-1.0, 1.0)
    assert one.up == 3.0


def test_ranks_of_simulated_numbers_have_the_distribution_of_real_ones() -> None:
    """Whatever the numbers are, equal ones included: here the mean of the statistic at the last step."""
    rng = np.random.default_rng(1)
    num, num_steps, allowed = 50, 80, 0.4
    real = []
    for _ in range(400):
        values = np.sort(rng.poisson(3, num).astype(np.float64))
        one = Cusum(cap=np.inf)
        for value in rng.poisson(3, num_steps):
            score = rank_score(values, float(value), rng.random())
            one.add(score - allowed, -score - allowed)
        real.append(one.statistic)
    draws = Draws.of(rng, num, 400, num_steps)
    pool = {"number": rng.poisson(3, num).astype(np.float64)}
    simulated = number_paths(rng, pool, draws, allowed)["number"][:, -1]
    error = np.hypot(np.std(real), simulated.std()) / np.sqrt(400)
    assert abs(np.mean(real) - simulated.mean()) < 3.5 * error


def test_what_never_happened_in_the_reference_may_still_happen_without_drift() -> None:
    paths = event_paths(np.random.default_rng(0), 0, 200, 400, 300)
    jumps = (np.diff(paths[:, MIN_SAMPLES:], axis=1) > 1).any(axis=1)  # a happening adds log 3
    assert 0.1 < jumps.mean() < 0.9


def test_a_happening_speaks_for_higher_odds_and_against_lower_ones() -> None:
    steps = EventSteps.of(20, 100)
    assert steps.more[1] > 0 > steps.more[0] and steps.less[0] > 0 > steps.less[1]
    p = 20.5 / 101
    for up, odds in ((steps.more, 3.0), (steps.less, 1 / 3)):
        changed = odds * p / (1 - p + odds * p)
        assert (1 - p) * np.exp(up[0]) + p * np.exp(up[1]) == pytest.approx(1)  # a likelihood ratio
        assert np.exp(up[1]) == pytest.approx(changed / p)
