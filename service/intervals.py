"""Confidence intervals and p-values of rates and means, for one look at the data. Only arithmetic.

For looks after every request see `service.sequential_test`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import atan, cos, erfc, exp, hypot, lgamma, pi, sqrt
from statistics import NormalDist

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
_NORMAL_FROM = 1000.0
"""Degrees of freedom from which Student's t is taken for normal: the quantiles differ by less than 0.15 %."""

_PANELS, _NEWTON_STEPS = 120, 12

Interval = tuple[float, float]


@dataclass(frozen=True)
class Moments:
    """How many numbers, their sum and the sum of their squares: enough for a mean and its error."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: Iterable[float]) -> Moments:
        numbers = tuple(values)
        return cls(len(numbers), sum(numbers), sum(number * number for number in numbers))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    @property
    def variance_of_mean(self) -> float | None:
        """None for fewer than two numbers."""
        if self.count < 2:
            return None
        spread = max(0.0, self.squares - self.total * self.total / self.count)
        return spread / (self.count - 1) / self.count


@dataclass(frozen=True)
class Difference:
    """Of two rates or means, with its 95 % interval and two-sided p-value; None where there is too little data."""

    value: float | None
    interval: Interval | None
    p_value: float | None


def wilson(rate: Moments) -> Interval | None:
    """Of a rate, from 0s and 1s (Wilson, JASA 22, 1927)."""
    if rate.mean is None:
        return None
    n, p = rate.count, rate.mean
    centre, scale = (p + _Z * _Z / (2 * n)), 1 + _Z * _Z / n
    half = _Z * sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n))
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def difference_of_rates(first: Moments, second: Moments) -> Difference:
    """Newcombe's hybrid score interval (Statistics in Medicine 17, 1998, method 10), and the pooled score test."""
    p, q = first.mean, second.mean
    of_first, of_second = wilson(first), wilson(second)
    if p is None or q is None or of_first is None or of_second is None:
        return Difference(None, None, None)
    lower = p - q - hypot(p - of_first[0], of_second[1] - q)
    upper = p - q + hypot(of_first[1] - p, q - of_second[0])
    pooled = (first.total + second.total) / (first.count + second.count)
    error = sqrt(pooled * (1 - pooled) * (1 / first.count + 1 / second.count))
    p_value = erfc(abs(p - q) / error / sqrt(2)) if error > 0 else 1.0
    return Difference(p - q, (lower, upper), p_value)


def difference_of_means(first: Moments, second: Moments) -> Difference:
    """Welch's t (Biometrika 34, 1947)."""
    a, b = first.variance_of_mean, second.variance_of_mean
    if first.mean is None or second.mean is None:
        return Difference(None, None, None)
    value = first.mean - second.mean
    if a is None or b is None:
        return Difference(value, None, None)
    if a + b == 0.0:
        return Difference(value, (value, value), 1.0 if value == 0.0 else 0.0)
    freedom = (a + b) ** 2 / (a * a / (first.count - 1) + b * b / (second.count - 1))
    return _by_t(value, sqrt(a + b), freedom)


def mean_of(values: Moments) -> Difference:
    """A mean (or a paired difference) against zero: Student's t."""
    variance = values.variance_of_mean
    if values.mean is None or variance is None:
        return Difference(values.mean, None, None)
    if variance == 0.0:
        return Difference(values.mean, (values.mean, values.mean), 1.0 if values.mean == 0.0 else 0.0)
    return _by_t(values.mean, sqrt(variance), values.count - 1)


def t_tail(t: float, freedom: float) -> float:
    """P(|T| > t). With x = sqrt(freedom) tan(angle), the density of T is cos(angle)^(freedom - 1) up to a factor."""
    if freedom >= _NORMAL_FROM:
        return erfc(abs(t) / sqrt(2))
    whole = sqrt(pi) / 2 * exp(lgamma(freedom / 2) - lgamma((freedom + 1) / 2))
    return _integral(freedom - 1.0, atan(abs(t) / sqrt(freedom))) / whole


def t_quantile(freedom: float, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| > t) = 1 - confidence. Newton's steps from the normal one: the tail is convex, so none is too
    long."""
    t = NormalDist().inv_cdf(0.5 + confidence / 2)
    if freedom >= _NORMAL_FROM:
        return t
    factor = exp(lgamma((freedom + 1) / 2) - lgamma(freedom / 2)) / sqrt(freedom * pi)
    for _ in range(_NEWTON_STEPS):
        density = factor * (1 + t * t / freedom) ** (-(freedom + 1) / 2)
        t += (t_tail(t, freedom) - (1 - confidence)) / (2 * density)
    return t


def _by_t(value: float, error: float, freedom: float) -> Difference:
    half = t_quantile(freedom) * error
    return Difference(value, (value - half, value + half), t_tail(value / error, freedom))


def _integral(power: float, start: float) -> float:
    """Of cos(angle) ** power up to pi / 2, by Simpson's rule; only as far as there is anything left of it."""
    end = min(pi / 2, start + 12.0 / sqrt(power + 1.0))
    step = (end - start) / _PANELS
    heights: list[float] = [max(0.0, cos(start + index * step)) ** power for index in range(_PANELS + 1)]
    return (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])) * step / 3
