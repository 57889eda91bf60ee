"""Intervals and significance of any metric that is a function of summed per-example values. Knows no text.

A metric is `finish(sum of its rows)`: `rows` is [num_examples, k], and `finish` takes [..., k] to [...]. A mean has
k = 2 (value, 1), corpus BLEU its n-gram counts. So one matrix product resamples all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import sqrt

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]
Finish = Callable[[Rows], NDArray[np.float64]]

NUM_RESAMPLES = 2000
NUM_SWAPS = 5000
MAX_EXACT = 12
"""Up to so many examples every assignment of a paired test is tried, not a sample of them."""
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """How much better one is than the other (negative: worse), with a 95 % interval and a two-sided p."""

    gain: float
    low: float
    high: float
    p: float


class Resampling:
    """The random draws for `num_examples` paired examples, the same for every metric and contestant of a report."""

    def __init__(self, num_examples: int, seed: int) -> None:
        self.num_examples = num_examples
        self._seed = seed

    @cached_property
    def _draws(self) -> Rows:
        """[NUM_RESAMPLES, num_examples]: how often a bootstrap sample holds each example."""
        generator = np.random.default_rng([self._seed, 0])
        share = np.full(self.num_examples, 1 / self.num_examples)
        return generator.multinomial(self.num_examples, share, size=NUM_RESAMPLES).astype(np.float64)

    @cached_property
    def _swaps(self) -> Rows:
        """[assignments, num_examples] of 0 and 1: where the two contestants change places."""
        if self.num_examples <= MAX_EXACT:
            bits = np.arange(2**self.num_examples)[:, None] >> np.arange(self.num_examples)
            return (bits & 1).astype(np.float64)
        generator = np.random.default_rng([self._seed, 1])
        return generator.integers(0, 2, size=(NUM_SWAPS, self.num_examples)).astype(np.float64)

    def estimate(self, rows: Rows, finish: Finish) -> Estimate:
        """Percentile bootstrap (Efron 1979). A resample in which the metric has no value is left out."""
        low, high = _percentiles(finish(self._draws @ rows))
        return Estimate(float(finish(rows.sum(axis=0))), low, high)

    def compare(self, mine: Rows, other: Rows, finish: Finish, *, higher_is_better: bool = True) -> Comparison:
        """Paired bootstrap for the interval; for p, approximate randomization (Noreen 1989): were the two equal, each
        example's results might as well have been the other's. Exact up to MAX_EXACT examples."""
        sign = 1.0 if higher_is_better else -1.0
        mine_all, other_all, difference = mine.sum(axis=0), other.sum(axis=0), other - mine
        gain = sign * float(finish(mine_all) - finish(other_all))
        low, high = _percentiles(sign * (finish(self._draws @ mine) - finish(self._draws @ other)))
        moved = self._swaps @ difference
        swapped = finish(mine_all + moved) - finish(other_all - moved)
        num_as_far = int((np.abs(swapped) >= abs(gain) - 1e-12).sum())
        exact = self.num_examples <= MAX_EXACT
        p = num_as_far / len(swapped) if exact else (num_as_far + 1) / (len(swapped) + 1)
        return Comparison(gain, low, high, p)


def smallest_p(num_examples: int) -> float:
    """What the paired test can reach at best with so many examples."""
    return 2.0 / 2.0**num_examples if num_examples <= MAX_EXACT else 1.0 / (NUM_SWAPS + 1)


def mean_rows(values: NDArray[np.float64]) -> Rows:
    """Rows for `ratio` that make it the mean of `values` [n]."""
    return np.stack([values, np.ones_like(values)], axis=1)


def ratio(sums: Rows) -> NDArray[np.float64]:
    """First sum over second; no value where the second is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)


def proportion(values: NDArray[np.float64]) -> Estimate:
    """A mean of few values: Wilson's interval (1927) when all are 0 or 1, where a bootstrap of equal values would
    claim certainty; otherwise a t-less normal interval cut to the values' own range 0..1."""
    num, mean = len(values), float(values.mean())
    if np.isin(values, (0.0, 1.0)).all():
        spread = Z_95 * sqrt(mean * (1 - mean) / num + Z_95**2 / (4 * num**2))
        centre, scale = mean + Z_95**2 / (2 * num), 1 + Z_95**2 / num
        low, high = max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
        return Estimate(mean, min(low, mean), max(high, mean))
    error = Z_95 * float(values.std(ddof=1)) / sqrt(num)
    return Estimate(mean, max(0.0, mean - error), min(1.0, mean + error))


def _percentiles(values: NDArray[np.float64]) -> tuple[float, float]:
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
