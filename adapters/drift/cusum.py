"""Has a number's level changed? Cumulative sums of ranks, and of what happens or not. Knows no threshold.

Page's two-sided CUSUM (1954): an observation adds a step to each of two sums, which never fall below 0; the statistic
is the larger one. A number's steps are the score of its rank within the reference (ties broken by lot) less an
allowance, and the same for less: so without drift the sums have one distribution whatever the numbers are. What
happens or not adds log(p1 / p0), where p1 has ODDS times the odds of the reference, or one part in ODDS of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
_SPREAD = math.pi / math.sqrt(3)
"""The standard deviation of a logistic variable."""
MIN_SAMPLES = 32
"""Before so many observations a sum is kept and not yet read."""
CAP = 2.0
"""A sum stops at so many thresholds, so that it comes down again when what raised it is over."""
ODDS = 3.0
PRIOR = 0.5
"""Jeffreys' prior: half a happening and half a not-happening that nobody saw."""


def allowance(num_reference: int) -> float:
    """How far from 0 a mean score may lie without adding up. The reference's own level is known to 1 / sqrt(n)
    standard deviations only, and that error, unlike noise, would add up for ever."""
    return 0.25 + 4.0 / math.sqrt(num_reference)


def rank_scores(u: Numbers) -> Numbers:
    """Relative ranks in (0, 1) -> logistic scores, of mean 0 and variance 1 without drift."""
    found: Numbers = np.log(u / (1 - u)) / _SPREAD
    return found


def rank_score(values: Numbers, value: float, lot: float) -> float:
    """Of a value among `values` [n], ascending. `lot` in [0, 1) says where in the gap between its neighbours it lies,
    and where among those that it equals: so its rank is uniform for a value that might be one of them."""
    low, high = np.searchsorted(values, value, "left"), np.searchsorted(values, value, "right")
    u = (low + max(lot, 1e-6) * (high - low + 1)) / (len(values) + 1)
    return math.log(u / (1 - u)) / _SPREAD


@dataclass(frozen=True)
class EventSteps:
    """What an observation adds to the two sums: (where it did not happen, where it happened)."""

    more: tuple[float, float]
    less: tuple[float, float]

    @classmethod
    def of(cls, num_happened: int, num: int) -> EventSteps:
        """Against a reference in which it happened so many times of `num`."""
        p = (num_happened + PRIOR) / (num + 2 * PRIOR)
        return cls(_log_ratios(p, ODDS), _log_ratios(p, 1 / ODDS))


def _log_ratios(p: float, odds: float) -> tuple[float, float]:
    changed = odds * p / (1 - p + odds * p)
    return math.log((1 - changed) / (1 - p)), math.log(changed / p)


@dataclass
class Cusum:
    """One stream's two sums."""

    cap: float
    up: float = 0.0
    down: float = 0.0

    @property
    def statistic(self) -> float:
        return max(self.up, self.down)

    def add(self, up: float, down: float) -> None:
        self.up = min(max(0.0, self.up + up), self.cap)
        self.down = min(max(0.0, self.down + down), self.cap)


def cusum_paths(up_steps: Numbers, down_steps: Numbers) -> NDArray[np.float32]:
    """The statistic of many streams after each step, without a cap; minus infinity where it is not yet read.
    Both: [streams, steps]."""
    num_streams, num_steps = up_steps.shape
    up, down = np.zeros(num_streams), np.zeros(num_streams)
    found = np.empty((num_steps, num_streams), dtype=np.float32)
    for t, (up_step, down_step) in enumerate(zip(_by_step(up_steps), _by_step(down_steps), strict=True)):
        up += up_step
        np.maximum(up, 0, out=up)
        down += down_step
        np.maximum(down, 0, out=down)
        np.maximum(up, down, out=found[t])
    found[: MIN_SAMPLES - 1] = -np.inf
    return np.ascontiguousarray(found.T)


def _by_step(steps: Numbers) -> Numbers:
    return np.ascontiguousarray(steps.T)
