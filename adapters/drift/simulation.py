"""Streams without drift, drawn from a pool of observations, and every statistic's path along them. Knows no threshold.

A stream and the reference that it is held against are both drawn from the pool with replacement, as many points for
the reference as there are: so a reference's own luck, which lasts as long as it, is in the paths. A drawn pair of the
same point would pull them nearer to each other than new prompts are; its kernel value is therefore replaced by the
one that makes it neither near nor far (0 in the centred kernel, which leaves an unbiased MMD² as it is). Numbers are
drawn by rank, each somewhere in the gap that belongs to its rank, which makes the simulation of their ranks exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapters.drift.cusum import PRIOR, EventSteps, cusum_paths, rank_scores
from adapters.drift.mmd import mmd2_paths

Paths = NDArray[np.float32]
"""[streams, steps], minus infinity where a statistic is not known yet."""
Indices = NDArray[np.intp]
STEPS_AT_ONCE = 65_536
"""As many as stay in a core's cache."""


@dataclass(frozen=True)
class Draws:
    """Indices of the pool. reference: [streams, n]; stream: [streams, steps]."""

    reference: Indices
    stream: Indices

    @classmethod
    def of(cls, rng: np.random.Generator, num_pool: int, num_streams: int, num_steps: int) -> Draws:
        reference = rng.integers(num_pool, size=(num_streams, num_pool))
        return cls(reference, rng.integers(num_pool, size=(num_streams, num_steps)))


def window_paths(
    kernel: NDArray[np.float32], draws: Draws, windows: Sequence[int], check: Callable[[], None]
) -> dict[int, Paths]:
    """MMD² by window. kernel: [n, n], of the pool with itself."""
    imputed = without_self_similarity(kernel)
    num_streams, num_steps = draws.stream.shape
    size = max(1, STEPS_AT_ONCE // num_steps)
    parts = []
    for first in range(0, num_streams, size):
        some = slice(first, first + size)
        parts.append(_window_paths(imputed, Draws(draws.reference[some], draws.stream[some]), windows, check))
    return {window: np.concatenate([part[window] for part in parts]) for window in windows}


def without_self_similarity(kernel: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n, n] -> the same with a diagonal that is 0 once the kernel is centred."""
    means = (kernel.sum(axis=1, dtype=np.float64) - np.diag(kernel)) / (len(kernel) - 1)
    found = np.ascontiguousarray(kernel).copy()
    np.fill_diagonal(found, 2 * means - means.mean())
    return found


def _window_paths(
    kernel: NDArray[np.float32], draws: Draws, windows: Sequence[int], check: Callable[[], None]
) -> dict[int, Paths]:
    num_pool, num_reference = len(kernel), draws.reference.shape[1]
    counts = np.zeros((len(draws.reference), num_pool), dtype=np.float32)
    np.add.at(counts, (np.arange(len(counts))[:, None], draws.reference), 1)
    to_reference = counts @ kernel / num_reference
    own = counts @ np.diag(kernel) / num_reference
    within = ((to_reference * counts).sum(axis=1, dtype=np.float64) - own) / (num_reference - 1)
    cross = np.take_along_axis(to_reference, draws.stream, axis=1).astype(np.float64)
    flat, rows = kernel.ravel(), draws.stream * num_pool

    def similar(lag: int) -> NDArray[np.float32]:
        check()
        found: NDArray[np.float32] = flat[rows[:, lag:] + draws.stream[:, :-lag]]
        return found

    return mmd2_paths(within, cross, similar, windows)


def number_paths(
    rng: np.random.Generator, numbers: Mapping[str, NDArray[np.float64]], draws: Draws, allowance: float
) -> dict[str, Paths]:
    """CUSUM of ranks, by name. numbers: [n] each, those of the pool."""
    num_pool = draws.reference.shape[1]
    found = {}
    for name, values in numbers.items():
        place = _places(rng, values)
        reference = np.sort((place[draws.reference] + rng.random(draws.reference.shape)) / num_pool, axis=1)
        stream = (place[draws.stream] + rng.random(draws.stream.shape)) / num_pool
        relative = (_num_below(reference, stream) + rng.random(stream.shape)) / (num_pool + 1)
        scores = rank_scores(relative)
        found[name] = cusum_paths(scores - allowance, -scores - allowance)
    return found


def event_paths(rng: np.random.Generator, num_happened: int, num: int, num_streams: int, num_steps: int) -> Paths:
    """CUSUM of likelihood ratios. The true frequency is not the reference's: each stream has one of those that so many
    of `num` leave possible (the posterior)."""
    steps = EventSteps.of(num_happened, num)
    p = rng.beta(num_happened + PRIOR, num - num_happened + PRIOR, size=num_streams)
    happened = (rng.random((num_streams, num_steps)) < p[:, None]).astype(np.intp)
    return cusum_paths(np.array(steps.more)[happened], np.array(steps.less)[happened])


def _places(rng: np.random.Generator, values: NDArray[np.float64]) -> Indices:
    """Each value's rank, 0 to n - 1, equal ones in random order."""
    order = np.lexsort((rng.random(len(values)), values))
    found = np.empty(len(values), dtype=np.intp)
    found[order] = np.arange(len(values))
    return found


def _num_below(rows: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.intp]:
    """Row by row, how many of the ascending row are below each value; all in [0, 1]."""
    return np.stack([np.searchsorted(row, searched) for row, searched in zip(rows, values, strict=True)])
