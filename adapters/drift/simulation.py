"""Streams without drift, drawn from a pool of prompts, and the path of every statistic along them. Knows no threshold.

A stream and the reference that it is held against are both drawn from the pool with replacement, as many points for
the reference as there are: so a reference's own luck, which lasts as long as it, is in the paths. A drawn pair of the
same point would pull them nearer to each other than new prompts are; its kernel value is therefore replaced by the
one that makes it neither near nor far (0 in the centred kernel, which leaves an unbiased MMD² as it is). Numbers are
drawn by rank, each somewhere in the gap that belongs to its rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapters.drift.cusum import cusum_paths, scores

Numbers = NDArray[np.float64]
Paths = NDArray[np.float32]
Indices = NDArray[np.intp]


@dataclass(frozen=True)
class Draws:
    """Indices of the pool. reference: [streams, n]; stream: [streams, steps]."""

    reference: Indices
    stream: Indices


def draw(rng: np.random.Generator, num_pool: int, num_streams: int, num_steps: int) -> Draws:
    return Draws(
        rng.integers(num_pool, size=(num_streams, num_pool)), rng.integers(num_pool, size=(num_streams, num_steps))
    )


def without_self_similarity(kernel: Paths) -> Paths:
    """[n, n] -> the same with a diagonal that is 0 once the kernel is centred."""
    num = len(kernel)
    means = (kernel.sum(axis=1, dtype=np.float64) - np.diag(kernel)) / (num - 1)
    found = kernel.copy()
    np.fill_diagonal(found, 2 * means - means.mean())
    return found


def window_paths(
    kernel: Paths, draws: Draws, windows: Sequence[int], check: Callable[[], None]
) -> dict[int, Paths]:
    """MMD² by window: [streams, steps], minus infinity until the window is full. kernel: `without_self_similarity`."""
    num_streams, num_steps = draws.stream.shape
    num_pool, num_reference = len(kernel), draws.reference.shape[1]
    counts = np.zeros((num_streams, num_pool), dtype=np.float32)
    np.add.at(counts, (np.arange(num_streams)[:, None], draws.reference), 1)
    to_reference = counts @ kernel / num_reference
    own = counts @ np.diag(kernel) / num_reference
    within = ((to_reference * counts).sum(axis=1, dtype=np.float64) - own) / (num_reference - 1)
    cross = np.take_along_axis(to_reference, draws.stream, axis=1).astype(np.float64)
    flat = np.ascontiguousarray(kernel).ravel()
    rows = draws.stream * num_pool
    with_earlier, with_later = np.zeros_like(cross), np.zeros_like(cross)
    found = {}
    for lag in range(1, max(windows)):
        check()
        similar = flat[rows[:, lag:] + draws.stream[:, :-lag]]
        with_earlier[:, lag:] += similar
        with_later[:, :-lag] += similar
        if lag + 1 in windows:
            inner = _sums_within(with_earlier, with_later, lag + 1)
            inner /= lag * (lag + 1) / 2
            inner -= 2 * _means(cross, lag + 1)
            inner += within[:, None]
            path = np.full(cross.shape, -np.inf, dtype=np.float32)
            path[:, lag:] = inner
            found[lag + 1] = path
    return found


def _sums_within(with_earlier: Numbers, with_later: Numbers, window: int) -> Numbers:
    """Sum over the pairs of each full window. One that enters brings its pairs with the window's others, one that
    leaves takes them along. Both: [streams, steps], with the window - 1 neighbours before and after."""
    # The first window is the sum of what its points bring; a point early in the stream has fewer earlier neighbours.
    entered = np.cumsum(with_earlier, axis=1)[:, window - 1 :]
    left = np.cumsum(with_later, axis=1)[:, : with_later.shape[1] - window]
    entered[:, 1:] -= left
    return entered


def _means(values: Numbers, window: int) -> Numbers:
    sums = np.cumsum(values, axis=1)
    found = sums[:, window - 1 :].copy()
    found[:, 1:] -= sums[:, :-window]
    return found / window


def scalar_paths(
    rng: np.random.Generator, places: Mapping[str, Indices], draws: Draws, allowance: float
) -> dict[str, Paths]:
    """CUSUM by name: [streams, steps]. places: each point's rank in the pool, 0 to n - 1."""
    num_pool = draws.reference.shape[1]
    found = {}
    for name, place in places.items():
        reference = np.sort((place[draws.reference] + rng.random(draws.reference.shape)) / num_pool, axis=1)
        u = (place[draws.stream] + rng.random(draws.stream.shape)) / num_pool
        below = _num_below(reference, u)
        relative = (below + rng.random(u.shape)) / (num_pool + 1)
        found[name] = cusum_paths(scores(relative), allowance).astype(np.float32)
    return found


def _num_below(sorted_rows: Numbers, values: Numbers) -> Numbers:
    """Row by row: how many of the row's are below each value; both in (0, 1)."""
    shift = 2.0 * np.arange(len(values))[:, None]
    found = np.searchsorted((sorted_rows + shift).ravel(), (values + shift).ravel()).reshape(values.shape)
    return found - sorted_rows.shape[1] * np.arange(len(values))[:, None]
