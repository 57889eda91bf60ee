"""The distance between the last prompts and the reference: MMD² with an RBF kernel. Knows no threshold.

MMD²(X, Y) = mean k(x, x') over pairs of X + mean k(y, y') over pairs of Y - 2 mean k(x, y), without the pairs of a
point with itself: unbiased, 0 on average where both have one distribution (Gretton et al. 2012, section 2.2). Over a
sliding window (Cobb, Van Looveren, Klaise 2021, arXiv 2108.00883) a new observation costs one row of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float32]


def kernel(x: Points, y: Points, bandwidth: float) -> Points:
    """x: [m, k], y: [n, k] -> [m, n]: exp(-|x - y|² / (2 bandwidth²))."""
    squared = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1) - 2 * (x @ y.T)
    found: Points = np.exp(np.maximum(squared, 0) * np.float32(-0.5 / bandwidth**2))
    return found


def median_bandwidth(points: Points) -> float:
    """The median distance between two points."""
    squared = (points * points).sum(axis=1)
    distances = squared[:, None] + squared - 2 * (points @ points.T)
    return float(np.sqrt(max(np.median(distances[np.triu_indices(len(points), 1)]), 0)))


def mmd2(reference: Points, window: Points, bandwidth: float) -> float:
    """The definition, from all pairs. reference: [n, k], window: [m, k]."""
    inner = [_mean_of_pairs(kernel(points, points, bandwidth)) for points in (reference, window)]
    return sum(inner) - 2 * float(kernel(reference, window, bandwidth).mean(dtype=np.float64))


def _mean_of_pairs(square: Points) -> float:
    size = len(square)
    return float(square.sum(dtype=np.float64) - np.trace(square, dtype=np.float64)) / (size * (size - 1))


class SlidingMmd:
    """MMD² of the last `window` points against the reference, for each of the `windows` that is full."""

    def __init__(self, reference: Points, bandwidth: float, windows: Sequence[int]) -> None:
        self.num_observed = 0
        self._reference = reference
        self._squares = (reference * reference).sum(axis=1)
        self._scale = np.float32(-0.5 / bandwidth**2)
        self._within_reference = _mean_of_pairs(kernel(reference, reference, bandwidth))
        self._windows = tuple(windows)
        size = max(windows)
        self._points = np.zeros((size, reference.shape[1]), dtype=np.float32)
        """A ring, as are the next two: the point t lies at t mod size."""
        self._cross = np.zeros(size)
        """Mean kernel of a point with the reference."""
        self._pairs = np.zeros((size, size), dtype=np.float32)

    def observe(self, point: Points) -> dict[int, float]:
        """point: [k]. The statistic by window, of those that are full."""
        slot = self.num_observed % len(self._points)
        self._points[slot] = point
        square = np.float32(point @ point)
        row = self._kernel_row(point, square, self._reference, self._squares)
        self._cross[slot] = row.mean(dtype=np.float64)
        near = self._kernel_row(point, square, self._points, (self._points * self._points).sum(axis=1))
        near[slot] = 0  # a point is no pair with itself
        self._pairs[slot], self._pairs[:, slot] = near, near
        self.num_observed += 1
        return self.statistics()

    def statistics(self) -> dict[int, float]:
        """As after the last observation."""
        size, found = len(self._points), {}
        for window in self._windows:
            if self.num_observed >= window:
                last = np.arange(self.num_observed - window, self.num_observed) % size
                pairs = self._pairs[np.ix_(last, last)] if window < size else self._pairs
                within = float(pairs.sum(dtype=np.float64)) / (window * (window - 1))
                found[window] = self._within_reference + within - 2 * float(self._cross[last].mean())
        return found

    def last_points(self) -> Points:
        """Oldest first: what `observe` has to be given again, from `first_slot` on, to stand where this stands."""
        kept = min(self.num_observed, len(self._points))
        return self._points[np.arange(self.num_observed - kept, self.num_observed) % len(self._points)]

    def restore(self, points: Points, num_observed: int) -> None:
        """Stand where another of the same reference stood, to the bit: `points` are its `last_points`."""
        self.num_observed = num_observed - len(points)
        for point in points:
            self.observe(point)

    def _kernel_row(self, point: Points, square: np.float32, others: Points, squares: Points) -> Points:
        return np.exp(np.maximum(squares + square - 2 * (others @ point), 0) * self._scale)


def mmd2_paths(
    within_reference: NDArray[np.float64],
    cross: NDArray[np.float64],
    similar: Callable[[int], NDArray[np.float32]],
    windows: Sequence[int],
) -> dict[int, NDArray[np.float32]]:
    """The statistic of many streams at each step, by window: [streams, steps], minus infinity until it is full.

    within_reference: [streams], the mean over pairs of a stream's reference. cross: [streams, steps], the mean kernel
    of a point with it. similar(lag): [streams, steps - lag], the kernel of each point with the one `lag` steps before.
    """
    with_earlier, with_later = np.zeros_like(cross), np.zeros_like(cross)
    found = {}
    for lag in range(1, max(windows)):
        kernels = similar(lag)
        with_earlier[:, lag:] += kernels
        with_later[:, :-lag] += kernels
        if (window := lag + 1) in windows:
            path = np.full(cross.shape, -np.inf, dtype=np.float32)
            within = _sums_within(with_earlier, with_later, window) / (window * lag / 2)
            path[:, lag:] = within - 2 * _means(cross, window) + within_reference[:, None]
            found[window] = path
    return found


def _sums_within(
    with_earlier: NDArray[np.float64], with_later: NDArray[np.float64], window: int
) -> NDArray[np.float64]:
    """Sum over the pairs of each full window. A point that enters brings its pairs with the window - 1 before it, one
    that leaves takes those with the window - 1 after it. Both: [streams, steps] -> [streams, steps - window + 1]."""
    found: NDArray[np.float64] = np.cumsum(with_earlier, axis=1)[:, window - 1 :]
    found[:, 1:] -= np.cumsum(with_later, axis=1)[:, :-window]
    return found


def _means(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    sums = np.cumsum(values, axis=1)
    found = sums[:, window - 1 :].copy()
    found[:, 1:] -= sums[:, :-window]
    return found / window
