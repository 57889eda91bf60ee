"""Whether a series grows: a least-squares line with a bound on its slope. Knows no process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

NUM_BLOCKS = 20
"""Neighbouring samples resemble each other; the means of so many stretches do so less, and the bound rests on them."""
T_95 = 2.101
"""Student's t, two-sided 95 %, of `NUM_BLOCKS` - 2 degrees of freedom."""


@dataclass(frozen=True)
class Slope:
    """Per minute, with a 95 % interval. `growth` is what the line rises over the whole series."""

    per_minute: float
    low: float
    high: float
    growth: float
    minutes: float


def slope_of(seconds: Sequence[float], values: Sequence[float]) -> Slope | None:
    """None with too few samples to say anything."""
    if len(values) < 2 * NUM_BLOCKS:
        return None
    size = len(values) / NUM_BLOCKS
    parts = [slice(round(i * size), round((i + 1) * size)) for i in range(NUM_BLOCKS)]
    x = [_mean(seconds[part]) / 60.0 for part in parts]
    y = [_mean(values[part]) for part in parts]
    middle_x, middle_y = _mean(x), _mean(y)
    spread = sum((one - middle_x) ** 2 for one in x)
    slope = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / spread
    left = sum((b - middle_y - slope * (a - middle_x)) ** 2 for a, b in zip(x, y, strict=True))
    error = T_95 * sqrt(left / (NUM_BLOCKS - 2) / spread)
    minutes = (seconds[-1] - seconds[0]) / 60.0
    return Slope(slope, slope - error, slope + error, slope * minutes, minutes)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
