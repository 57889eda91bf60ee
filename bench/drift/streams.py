"""Many streams of prompts through one reference's tests at once, with the readings of an InputMonitor.

A stream is a row of indices of a pool. A pool is finite: a stream without drift walks through a random order of it,
and through another one when it is through, so that a prompt comes again only after all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from adapters.drift.cusum import cusum_paths, rank_scores
from adapters.drift.mmd import kernel, mmd2, mmd2_paths
from adapters.drift.monitor import EMBEDDING
from adapters.drift.reference import DriftReference, ScalarReference
from bench.drift.prompts import Prompts

Indices = NDArray[np.intp]
Ratios = NDArray[np.float32]
BLOCK = 64
"""The largest window: a point has pairs with its own block and the one before."""


def walks(rng: np.random.Generator, pool: Indices, num_streams: int, num_steps: int) -> Indices:
    """[streams, steps]: each through its own random orders of the pool."""
    rounds = -(-num_steps // len(pool))
    orders = [np.concatenate([rng.permutation(pool) for _ in range(rounds)]) for _ in range(num_streams)]
    return np.stack(orders)[:, :num_steps]


def ratios(
    reference: DriftReference, prompts: Prompts, streams: Indices, rng: np.random.Generator
) -> dict[str, Ratios]:
    """By signal, statistic over threshold at each step: [streams, steps]; minus infinity while unknown."""
    points = reference.project(prompts.embeddings)[streams]
    found = {EMBEDDING: _window_ratios(reference, points)}
    for name, values in prompts.numbers.items():
        found[name] = _number_ratios(reference.scalars[name], values[streams], rng)
    return found


def first_alarms(found: Mapping[str, Ratios]) -> Indices:
    """[streams]: counted from 1; one more than there are steps where no signal raises one."""
    alarms = np.logical_or.reduce([path >= 1 for path in found.values()])
    first: Indices = np.where(alarms.any(axis=1), alarms.argmax(axis=1) + 1, alarms.shape[1] + 1)
    return first


def _window_ratios(reference: DriftReference, points: NDArray[np.float32]) -> Ratios:
    """points: [streams, steps, k]."""
    num_streams, num_steps, width = points.shape
    own = reference.points
    cross = kernel(points.reshape(-1, width), own, reference.bandwidth).mean(axis=1, dtype=np.float64)
    within = _within(own, reference.bandwidth)
    bands = _bands(points, reference.bandwidth)

    def similar(lag: int) -> NDArray[np.float32]:
        rows = np.arange(BLOCK)
        found: NDArray[np.float32] = bands[:, :, rows, BLOCK + rows - lag].reshape(num_streams, -1)[:, lag:num_steps]
        return found

    sizes: Sequence[int] = sorted(reference.thresholds)
    paths = mmd2_paths(np.full(num_streams, within), cross.reshape(num_streams, num_steps), similar, sizes)
    found: Ratios = np.maximum.reduce([_divide(paths[size], reference.thresholds[size], size) for size in sizes])
    return found


def _within(points: NDArray[np.float32], bandwidth: float) -> float:
    """The mean kernel over the pairs of the reference: what is left of its MMD² from a window of two points."""
    two = points[:2]
    pair = float(kernel(two[:1], two[1:], bandwidth)[0, 0])
    return mmd2(points, two, bandwidth) - pair + 2 * float(kernel(points, two, bandwidth).mean(dtype=np.float64))


def _bands(points: NDArray[np.float32], bandwidth: float) -> NDArray[np.float32]:
    """[streams, blocks, BLOCK, 2 * BLOCK]: the kernel of each point with its block and the one before."""
    num_streams, num_steps, width = points.shape
    num_blocks = -(-num_steps // BLOCK)
    flat = np.zeros((num_streams, (num_blocks + 1) * BLOCK, width), dtype=np.float32)
    flat[:, BLOCK : BLOCK + num_steps] = points
    padded = flat.reshape(num_streams, num_blocks + 1, BLOCK, width)
    neighbours = np.concatenate([padded[:, :-1], padded[:, 1:]], axis=2)
    squares = (neighbours * neighbours).sum(axis=3)
    products = padded[:, 1:] @ neighbours.transpose(0, 1, 3, 2)
    distances = squares[:, :, BLOCK:, None] + squares[:, :, None, :] - 2 * products
    found: NDArray[np.float32] = np.exp(np.maximum(distances, 0) * np.float32(-0.5 / bandwidth**2))
    return found


def _divide(path: NDArray[np.float32], thresholds: NDArray[np.float64], window: int) -> Ratios:
    steps = np.clip(np.arange(path.shape[1]) - (window - 1), 0, window - 1)
    found: Ratios = (path / thresholds[steps]).astype(np.float32)
    return found


def _number_ratios(scalar: ScalarReference, values: NDArray[np.float64], rng: np.random.Generator) -> Ratios:
    low, high = (np.searchsorted(scalar.values, values, side) for side in ("left", "right"))
    scores = rank_scores((low + rng.random(values.shape) * (high - low + 1)) / (len(scalar.values) + 1))
    path = cusum_paths(scores - scalar.allowance, -scores - scalar.allowance)
    found: Ratios = (path / scalar.threshold).astype(np.float32)
    return found
