"""Makes a drift reference of the prompts that an adapter was trained on. Knows no file.

One prompt in four finds the directions in which prompts differ most, and is no part of the reference: what the others
are projected on must not be fitted to them, or new prompts would lie further out than they do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.drift.calibration import NUM_STREAMS, calibrate, num_steps_for, starting_thresholds
from adapters.drift.cusum import allowance
from adapters.drift.mmd import kernel, median_bandwidth
from adapters.drift.reference import DriftReference, ScalarReference
from adapters.drift.simulation import Draws, Paths, number_paths, window_paths
from adapters.errors import DriftReferenceError, TooFewPromptsError

MIN_PROMPTS = 64
WINDOWS = (32, 64)
MAX_COMPONENTS = 64
FIT_SHARE = 4
"""One in so many prompts is used to find the components."""
EMBEDDING_SHARE = 0.5
"""Of the false alarms; numbers share the rest."""


def build_reference(
    embeddings: NDArray[np.float32],
    scalars: Mapping[str, NDArray[np.float64]],
    *,
    basis: str,
    run_length: float,
    seed: int,
    check: Callable[[], None],
) -> DriftReference:
    """embeddings: [n, d], scalars: [n] each, row by row of one prompt. Raises TooFewPromptsError, and
    DriftReferenceError where something is missing or not finite.

    A prompt that is there again counts once, as it does in traffic. `check` is called often and may raise. The same
    input gives the same reference.
    """
    _check_input(embeddings, scalars)
    rng = np.random.default_rng(seed)
    order = rng.permutation(_distinct(embeddings))
    fit, kept = np.split(order, [len(order) // FIT_SHARE])
    mean, components = principal_components(embeddings[fit])
    points = ((embeddings[kept] - mean) @ components.T).astype(np.float32)
    numbers = {name: values[kept].astype(np.float64) for name, values in sorted(scalars.items())}
    bandwidth, allowed = median_bandwidth(points), allowance(len(points))

    draws = Draws.of(rng, len(points), NUM_STREAMS, num_steps_for(run_length))
    windows = window_paths(kernel(points, points, bandwidth), draws, WINDOWS, check)
    sums = number_paths(rng, numbers, draws, allowed)
    levels = calibrate({**windows, **sums}, _shares(sums), run_length, check)
    return DriftReference(
        basis,
        run_length,
        mean,
        components,
        points,
        bandwidth,
        {size: starting_thresholds(path, size, levels[size], run_length) for size, path in windows.items()},
        {name: ScalarReference(np.sort(values), allowed, levels[name]) for name, values in numbers.items()},
    )


def principal_components(embeddings: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean [d] and the directions of most variance [k, d]: half as many as there are vectors, at most 64."""
    mean = embeddings.mean(axis=0, dtype=np.float64)
    _, _, directions = np.linalg.svd(embeddings - mean, full_matrices=False)
    kept = directions[: min(MAX_COMPONENTS, len(embeddings) // 2)]
    signs = np.sign(kept[np.arange(len(kept)), np.abs(kept).argmax(axis=1)])
    return mean.astype(np.float32), np.ascontiguousarray(kept * signs[:, None], dtype=np.float32)


def _check_input(embeddings: NDArray[np.float32], scalars: Mapping[str, NDArray[np.float64]]) -> None:
    named: dict[str, NDArray[Any]] = {"embeddings": embeddings, **scalars}
    for name, values in named.items():
        if len(values) != len(embeddings) or not np.isfinite(values).all():
            raise DriftReferenceError(f"{name}: a finite value is needed for each of {len(embeddings)} prompts")


def _distinct(embeddings: NDArray[np.float32]) -> NDArray[np.intp]:
    """The rows that differ, in their order."""
    _, first = np.unique(embeddings, axis=0, return_index=True)
    if len(first) < MIN_PROMPTS:
        raise TooFewPromptsError(f"{len(first)} different prompts make no drift reference: {MIN_PROMPTS} are needed")
    return np.sort(first)


def _shares(numbers: Mapping[str, Paths]) -> dict[str | int, float]:
    """Of the false alarms, by signal and window."""
    embedding = EMBEDDING_SHARE if numbers else 1.0
    shares: dict[str | int, float] = dict.fromkeys(WINDOWS, embedding / len(WINDOWS))
    return shares | {name: (1 - embedding) / len(numbers) for name in numbers}
