"""MMD² with one kernel row an observation, and for many streams at once, against its definition."""

from __future__ import annotations

import numpy as np
import pytest

from adapters.drift.mmd import SlidingMmd, kernel, median_bandwidth, mmd2, mmd2_paths
from tests.adapters.drifting import vectors

WINDOWS = (5, 12)


def test_the_kernel_is_that_of_the_formula() -> None:
    rng = np.random.default_rng(0)
    x, y = vectors(rng, 3), vectors(rng, 4)
    slow = [[np.exp(-float(((a - b) ** 2).sum()) / (2 * 1.7**2)) for b in y] for a in x]
    np.testing.assert_allclose(kernel(x, y, 1.7), slow, rtol=1e-5)


def test_mmd2_is_the_mean_over_pairs_of_different_points() -> None:
    rng = np.random.default_rng(0)
    x, y = vectors(rng, 4), vectors(rng, 3, shift=1.0)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float(kernel(a[None], b[None], 1.0)[0, 0])

    among_x = np.mean([k(x[i], x[j]) for i in range(4) for j in range(4) if i != j])
    among_y = np.mean([k(y[i], y[j]) for i in range(3) for j in range(3) if i != j])
    across = np.mean([k(a, b) for a in x for b in y])
    assert mmd2(x, y, 1.0) == pytest.approx(among_x + among_y - 2 * across, abs=1e-6)


def test_the_bandwidth_is_the_median_distance() -> None:
    points = vectors(np.random.default_rng(0), 9)
    distances = [float(np.linalg.norm(points[i] - points[j])) for i in range(9) for j in range(i)]
    assert median_bandwidth(points) == pytest.approx(np.median(distances), rel=1e-4)


def test_a_row_an_observation_gives_what_all_pairs_give() -> None:
    rng = np.random.default_rng(1)
    reference, stream = vectors(rng, 40), vectors(rng, 40, shift=0.3)
    bandwidth = median_bandwidth(reference)
    sliding = SlidingMmd(reference, bandwidth, WINDOWS)
    for t, point in enumerate(stream, 1):
        found = sliding.observe(point)
        assert set(found) == {window for window in WINDOWS if t >= window}
        for window, value in found.items():
            assert value == pytest.approx(mmd2(reference, stream[t - window : t], bandwidth), abs=2e-6)


def test_many_streams_at_once_give_what_one_gives() -> None:
    rng = np.random.default_rng(2)
    reference, streams = vectors(rng, 40), np.stack([vectors(rng, 30), vectors(rng, 30, shift=1.0)])
    bandwidth = median_bandwidth(reference)
    kernels = np.stack([kernel(stream, stream, bandwidth) for stream in streams])
    cross = np.stack([kernel(stream, reference, bandwidth).mean(axis=1, dtype=np.float64) for stream in streams])
    square = kernel(reference, reference, bandwidth)
    within = (square.sum(dtype=np.float64) - len(reference)) / (len(reference) * (len(reference) - 1))
    paths = mmd2_paths(np.full(2, within), cross, lambda lag: np.diagonal(kernels, -lag, axis1=1, axis2=2), WINDOWS)
    for row, stream in enumerate(streams):
        sliding = SlidingMmd(reference, bandwidth, WINDOWS)
        for t, point in enumerate(stream):
            found = sliding.observe(point)
            for window in WINDOWS:
                assert paths[window][row, t] == pytest.approx(found.get(window, -np.inf), abs=2e-6)


def test_a_sliding_window_is_restored_to_the_bit() -> None:
    rng = np.random.default_rng(3)
    reference, stream = vectors(rng, 40), vectors(rng, 60)
    for seen in (0, 3, 12, 31):
        first = SlidingMmd(reference, 1.0, WINDOWS)
        for point in stream[:seen]:
            first.observe(point)
        second = SlidingMmd(reference, 1.0, WINDOWS)
        second.restore(first.last_points(), first.num_observed)
        assert [first.observe(point) for point in stream[seen:]] == [second.observe(point) for point in stream[seen:]]
