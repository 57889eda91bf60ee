"""Thresholds under which streams without drift run as long as promised. Knows the paths of statistics, not of what.

After Cobb, Van Looveren, Klaise 2021 (arXiv 2108.00883): false alarms should come as rarely after few observations as
after many, so the first thresholds of a window differ from the later ones, which are constant. Here the constant ones
are those under which the *mean* run length over simulated references is the promised one: a reference that happens
to lie well runs longer than one that lies badly, and the mean of run lengths is not one over the mean rate of alarms.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Signal = TypeVar("Signal", bound=Hashable)
Paths = NDArray[np.float32]
NUM_STREAMS = 320
MAX_STEPS = 20_000
MIN_STEPS = 512
NUM_HALVINGS = 20
TAIL = 50
"""A first threshold is looked for among the highest values, so many times as many as pass it."""
START_STRIDE = 8
"""Any step may be the first of a stream as far as a window is concerned; so many lie between those that are tried."""


def num_steps_for(run_length: float) -> int:
    """How long simulated streams are: most of them should end in an alarm, as far as that can be afforded."""
    return int(min(max(3 * run_length, MIN_STEPS), MAX_STEPS))


def calibrate(
    paths: Mapping[Signal, Paths], shares: Mapping[Signal, float], run_length: float, check: Callable[[], None]
) -> dict[Signal, float]:
    """The level of each signal. paths: [streams, steps], shares: of the false alarms, together 1.

    Levels are the quantiles that would give each signal its share were they independent; what all of them give
    together is then counted, and moved until it is the promise.
    """
    num_steps = next(iter(paths.values())).shape[1]
    highest = {signal: np.sort(path.max(axis=1)) for signal, path in paths.items()}

    def levels(rate: float) -> dict[Signal, float]:
        return {signal: _quantile(values, np.exp(-rate * shares[signal])) for signal, values in highest.items()}

    low, high = 0.0, 8.0 + 8.0 * num_steps / run_length
    for _ in range(NUM_HALVINGS):
        check()
        rate = (low + high) / 2
        alarms = first_alarms(paths, levels(rate))
        low, high = (rate, high) if mean_run_length(alarms, num_steps) > run_length else (low, rate)
    return levels(low)


def first_alarms(paths: Mapping[Signal, Paths], levels: Mapping[Signal, float]) -> NDArray[np.intp]:
    """[streams]: the step, counted from 1, at which any signal reaches its level; steps + 1 where none does."""
    alarms = np.logical_or.reduce([paths[signal] >= level for signal, level in levels.items()])
    found: NDArray[np.intp] = np.where(alarms.any(axis=1), alarms.argmax(axis=1) + 1, alarms.shape[1] + 1)
    return found


def mean_run_length(alarms: NDArray[np.intp], num_steps: int) -> float:
    """Of streams that were watched for `num_steps`. The quiet ones go on with the rate of alarms of the later half."""
    observed = np.minimum(alarms, num_steps)
    quiet = float((alarms > num_steps).mean())
    half = num_steps // 2
    num_late = int(((alarms > half) & (alarms <= num_steps)).sum())
    steps_late = float(np.maximum(observed - half, 0).sum())
    return float(observed.mean()) + quiet * steps_late / max(num_late, 0.5)


def starting_thresholds(path: Paths, window: int, level: float, run_length: float) -> NDArray[np.float64]:
    """[window]: for the first full window and the next ones, the last being `level`: each is passed by as large a
    share of the streams that passed none before. path: [streams, steps] of this window's statistic."""
    starts = np.arange(window - 1, path.shape[1] - window, START_STRIDE)
    quiet = np.ones((len(path), len(starts)), dtype=bool)
    found = np.empty(window)
    floor = np.quantile(path[:, starts], 1 - min(TAIL / run_length, 1))
    for step in range(window):
        here = path[:, starts + step]
        highest = np.sort(here[quiet & (here >= floor)])[::-1]
        found[step] = np.interp(quiet.sum() / run_length, np.arange(len(highest)), highest)
        quiet &= here < found[step]
    found *= level / found[-1]
    return found


def _quantile(ascending: NDArray[np.float32], q: float) -> float:
    return float(np.interp(q * (len(ascending) - 1), np.arange(len(ascending)), ascending))
