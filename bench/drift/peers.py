"""Usual two-sample tests of a window against a reference, as p-values. Knows no stream and no promise.

All on the same projected vectors. reference: [n, k]; windows: [windows, m, k] -> [windows].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float32]
PValues = NDArray[np.float64]
Test = Callable[[Points, Points, np.random.Generator], PValues]
NUM_PERMUTATIONS = 199
NUM_FOLDS = 4
NUM_NEWTON_STEPS = 6
RIDGE = 1.0


def kolmogorov_smirnov(reference: Points, windows: Points, rng: np.random.Generator) -> PValues:
    """A test for each component (asymptotic p, Stephens 1970), the smallest p times their number (Bonferroni)."""
    num, size, width = len(reference), windows.shape[1], windows.shape[2]
    smallest = np.ones(len(windows))
    scale = math.sqrt(num * size / (num + size))
    steps = np.arange(size + 1) / size
    for component in range(width):
        values = np.sort(windows[:, :, component], axis=1)
        below = np.searchsorted(np.sort(reference[:, component]), values) / num
        distance = np.maximum((steps[1:] - below).max(axis=1), (below - steps[:-1]).max(axis=1))
        smallest = np.minimum(smallest, _kolmogorov((scale + 0.12 + 0.11 / scale) * distance))
    smallest *= width
    return np.minimum(smallest, 1.0, out=smallest)


def _kolmogorov(values: NDArray[np.float64]) -> PValues:
    terms = [(-1.0) ** (j - 1) * np.exp(-2.0 * j * j * values**2) for j in range(1, 60)]
    found: PValues = np.clip(2 * np.sum(terms, axis=0), 0.0, 1.0)
    found[values < 0.2] = 1.0  # where the series converges slowly, to 1
    return found


def energy_distance(reference: Points, windows: Points, rng: np.random.Generator) -> PValues:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, p by random permutations (Székely and Rizzo 2004)."""
    num, size = len(reference), windows.shape[1]
    labels = np.zeros((NUM_PERMUTATIONS + 1, num + size))
    labels[:, :size] = 1
    labels[1:] = rng.permuted(labels[1:], axis=1)
    found = np.empty(len(windows))
    for index, window in enumerate(windows):
        points = np.concatenate([window, reference]).astype(np.float64)
        squares = (points * points).sum(axis=1)
        distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * points @ points.T, 0))
        to_window = labels @ distances
        inside = (to_window * labels).sum(axis=1)
        across = to_window.sum(axis=1) - inside
        outside = distances.sum() - inside - 2 * across
        energy = 2 * across / (num * size) - inside / size**2 - outside / num**2
        found[index] = (energy >= energy[0] - 1e-12).sum() / (NUM_PERMUTATIONS + 1)
    return found


def classifier(reference: Points, windows: Points, rng: np.random.Generator) -> PValues:
    """Can a logistic regression tell them apart? Cross-validated against as many points of the reference, p of so many
    right guesses by a fair coin (Lopez-Paz and Oquab 2017)."""
    size = windows.shape[1]
    chosen = np.stack([rng.choice(len(reference), size, replace=False) for _ in windows])
    points = np.concatenate([windows, reference[chosen]], axis=1).astype(np.float64)
    points = (points - points.mean(axis=1, keepdims=True)) / (points.std(axis=1, keepdims=True) + 1e-9)
    points = np.concatenate([points, np.ones((*points.shape[:2], 1))], axis=2)
    labels = np.repeat([1.0, 0.0], size)
    fold = rng.permutation(2 * size) % NUM_FOLDS
    num_right = np.zeros(len(windows), dtype=np.intp)
    for held_out in range(NUM_FOLDS):
        train, test = fold != held_out, fold == held_out
        weights = _logistic(points[:, train], labels[train])
        guesses = (points[:, test] @ weights[:, :, None])[:, :, 0] > 0
        num_right += (guesses == (labels[test] > 0.5)).sum(axis=1)
    return _coin(2 * size)[num_right]


def _logistic(points: NDArray[np.float64], labels: NDArray[np.float64]) -> NDArray[np.float64]:
    """points: [windows, rows, k] -> weights [windows, k], with a ridge."""
    width = points.shape[2]
    weights = np.zeros((len(points), width))
    for _ in range(NUM_NEWTON_STEPS):
        p = 1 / (1 + np.exp(-(points @ weights[:, :, None])[:, :, 0]))
        gradient = ((p - labels)[:, None] @ points)[:, 0] + RIDGE * weights
        hessian = points.transpose(0, 2, 1) @ (points * (p * (1 - p))[:, :, None]) + RIDGE * np.eye(width)
        weights -= np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
    return weights


def _coin(num: int) -> NDArray[np.float64]:
    """[num + 1]: the chance of at least so many heads."""
    chances = np.array([math.comb(num, heads) for heads in range(num + 1)], dtype=np.float64) / 2.0**num
    return np.cumsum(chances[::-1])[::-1]


TESTS: dict[str, Test] = {
    "KS on PCA components": kolmogorov_smirnov,
    "energy distance": energy_distance,
    "classifier": classifier,
}
