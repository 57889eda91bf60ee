"""Has a number's level changed? Cumulative sums of ranks, and of what happens or not. Knows no threshold.

A value counts by its rank within the reference (ties broken by lot), so that without drift the sums have one
distribution whatever the numbers are. Page's two-sided CUSUM (1954): S+ = max(0, S+ + score - allowance), and the same
for -score; the statistic is the larger one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
_SPREAD = math.pi / math.sqrt(3)
"""The standard deviation of a logistic variable."""


def allowance(num_reference: int) -> float:
    """How far from 0 a mean score may lie without adding up. The reference's own level is known to 1 / sqrt(n)
    standard deviations only, and that error, unlike noise, would add up for ever."""
    return 0.25 + 4.0 / math.sqrt(num_reference)


def scores(u: Numbers) -> Numbers:
    """Relative ranks in (0, 1) -> logistic scores, of mean 0 and variance 1 without drift."""
    found: Numbers = np.log(u / (1 - u)) / _SPREAD
    return found


def relative_rank(values: Numbers, value: float, lot: float) -> float:
    """`values`: [n], ascending. In (0, 1), uniform for a value that might be one of them; `lot` in (0, 1) decides
    between equal ones."""
    low, high = np.searchsorted(values, value, "left"), np.searchsorted(values, value, "right")
    return float(low + lot * (high - low + 1)) / (len(values) + 1)


@dataclass
class Cusum:
    """One stream's sums, in standard deviations."""

    allowance: float
    cap: float = math.inf
    """Sums stop here, so that they come down again when what raised them is over."""
    up: float = 0.0
    down: float = 0.0

    @property
    def statistic(self) -> float:
        return max(self.up, self.down)

    def add(self, score: float) -> None:
        self.up = min(max(0.0, self.up + score - self.allowance), self.cap)
        self.down = min(max(0.0, self.down - score - self.allowance), self.cap)


def cusum_paths(steps: Numbers, allowance: float) -> Numbers:
    """scores: [streams, steps] -> the statistic at each step."""
    up, down = np.zeros(len(steps)), np.zeros(len(steps))
    found = np.empty_like(steps)
    for t in range(steps.shape[1]):
        np.maximum(up + (steps[:, t] - allowance), 0, out=up)
        np.maximum(down - (steps[:, t] + allowance), 0, out=down)
        np.maximum(up, down, out=found[:, t])
    return found
