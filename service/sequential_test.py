"""Whether one stream of numbers in [0, 1] has a higher mean than another, asked as often as one likes. Only arithmetic.

An e-process: for fixed means p and q of the two streams,

    E(p, q) = m(A) / L(A; p) * m(B) / L(B; q),   L(X; p) = p^s (1 - p)^(n - s)   for n numbers that add up to s,

where m is L mixed over p with Jeffreys' prior Beta(1/2, 1/2) (Robbins, Ann. Math. Stat. 41, 1970). Under the true
means it is a nonnegative (super)martingale that starts at 1, however the numbers of the two streams take turns and also
when they are not 0 or 1 but between (L is log-linear, hence convex, in each number). The null hypothesis "mean of A
<= mean of B + margin" is judged by the least E(p, q) over it, as in universal inference (Wasserman, Ramdas and
Balakrishnan, arXiv 1912.11436). By Ville's inequality it ever reaches 1 / alpha with a probability of at most alpha
while the hypothesis holds: peeking after every number, for ever, is honest, and a share that changes on the way does
no harm.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, inf, lgamma, log, pi

_SEARCH_STEPS = 50
_TINY = 1e-300
_INVERSION_STEPS = 24
_MAX_LOG_E = 690.0
"""exp() of it is a number that JSON can hold."""


@dataclass(frozen=True)
class Stream:
    """`count` numbers in [0, 1] that add up to `total`."""

    count: float
    total: float

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    def log_likelihood(self, mean: float) -> float:
        return _times_log(self.total, mean) + _times_log(self.count - self.total, 1.0 - mean)

    def slope(self, mean: float) -> float:
        """The derivative of the log-likelihood, between 0 and 1."""
        return self.total / max(mean, _TINY) - (self.count - self.total) / max(1.0 - mean, _TINY)

    def log_mixture(self) -> float:
        """log of the likelihood mixed over Beta(1/2, 1/2)."""
        return lgamma(self.total + 0.5) + lgamma(self.count - self.total + 0.5) - lgamma(self.count + 1.0) - log(pi)


def log_e_value(first: Stream, second: Stream, margin: float = 0.0) -> float:
    """Evidence against "mean of `first` <= mean of `second` + margin"; reject at log(1 / alpha). -1 < margin < 1."""
    return first.log_mixture() + second.log_mixture() - _best_log_likelihood(first, second, margin)


def anytime_interval(first: Stream, second: Stream, alpha: float) -> tuple[float, float]:
    """For mean of `first` - mean of `second`: covers it at all times at once with probability 1 - alpha."""
    threshold = log(2.0 / alpha)
    lower = _largest_rejected(first, second, threshold)
    return lower, -_largest_rejected(second, first, threshold)


def e_value(log_e: float) -> float:
    return exp(min(log_e, _MAX_LOG_E))


def always_valid_p(log_e: float) -> float:
    return min(1.0, exp(-log_e)) if log_e > 0 else 1.0


def _largest_rejected(first: Stream, second: Stream, threshold: float) -> float:
    """The largest margin that `first` exceeds `second` by for sure; -1 when there is none."""
    low, high = -1.0, max(-1.0, min(1.0, first.mean - second.mean))
    for _ in range(_INVERSION_STEPS):
        middle = (low + high) / 2
        if log_e_value(first, second, middle) >= threshold:
            low = middle
        else:
            high = middle
    return low


def _best_log_likelihood(first: Stream, second: Stream, margin: float) -> float:
    """The largest over all means of which that of `first` is at most `margin` above that of `second`."""
    if first.mean <= second.mean + margin:
        return first.log_likelihood(first.mean) + second.log_likelihood(second.mean)

    mean = _edge_mean(first, second, margin)
    return first.log_likelihood(mean + margin) + second.log_likelihood(mean)


def _edge_mean(first: Stream, second: Stream, margin: float) -> float:
    """The likeliest mean of `second` when that of `first` is `margin` above: the log-likelihood is concave there."""
    if margin == 0.0:
        return (first.total + second.total) / (first.count + second.count)
    low, high = max(0.0, -margin), min(1.0, 1.0 - margin)
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        if first.slope(middle + margin) + second.slope(middle) > 0.0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _times_log(factor: float, value: float) -> float:
    if factor <= 0.0:
        return 0.0
    return factor * log(value) if value > 0.0 else -inf
