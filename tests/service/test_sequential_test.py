"""The test that may be looked at after every request: its false alarms by simulation, its power, its slow reference."""

from __future__ import annotations

from math import exp, log

import numpy as np
import pytest
from numpy.typing import NDArray

from service.sequential_test import Stream, always_valid_p, anytime_interval, log_e_value

ALPHA = 0.05


def first_alarm(
    rng: np.random.Generator, rates: tuple[float, float], share: float, num: int, *, margin: float = 0.0, every: int = 1
) -> int | None:
    """After how many requests a canary is found worse, looking after every `every`-th; None when never."""
    is_canary = rng.random(num) < share
    return _first_alarm(is_canary, rng.random(num) < np.where(is_canary, *rates), margin, every)


def _first_alarm(is_canary: NDArray[np.bool_], values: NDArray[np.generic], margin: float, every: int) -> int | None:
    counts = [np.cumsum(side) for side in (is_canary, ~is_canary)]
    totals = [np.cumsum(np.where(side, values, 0)) for side in (is_canary, ~is_canary)]
    for look in range(every - 1, len(values), every):
        canary, stable = (Stream(float(n[look]), float(s[look])) for n, s in zip(counts, totals, strict=True))
        if log_e_value(canary, stable, margin) >= log(1 / ALPHA):
            return look + 1
    return None


def reference(canary: list[int], stable: list[int], margin: float) -> float:
    """The least product of the two mixtures over a grid of the null hypothesis, by numerical integration."""
    grid = (np.arange(4000) + 0.5) / 4000
    prior = 1 / np.sqrt(grid * (1 - grid))
    prior /= prior.sum()

    def likelihood(xs: list[int], p: NDArray[np.float64]) -> NDArray[np.float64]:
        out: NDArray[np.float64] = p ** sum(xs) * (1 - p) ** (len(xs) - sum(xs))
        return out

    mixed = (likelihood(canary, grid) * prior).sum() * (likelihood(stable, grid) * prior).sum()
    p, q = np.meshgrid(grid[::8], grid[::8], indexing="ij")
    null = p <= q + margin
    best = (likelihood(canary, p) * likelihood(stable, q))[null].max()
    return float(mixed / best)


@pytest.mark.parametrize("margin", [0.0, 0.1, -0.1])
def test_the_closed_form_is_the_mixture_over_the_least_favourable_null(margin: float) -> None:
    canary, stable = [1, 1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 0, 0, 0, 1, 0]
    fast = exp(log_e_value(Stream(7, 5), Stream(10, 2), margin))
    assert fast == pytest.approx(reference(canary, stable, margin), rel=0.02)


@pytest.mark.parametrize("rate", [0.02, 0.3])
def test_a_canary_that_is_no_worse_is_rarely_taken_back_however_often_one_looks(rate: float) -> None:
    rng = np.random.default_rng(11)
    alarms = sum(first_alarm(rng, (rate, rate), 0.2, 300, every=3) is not None for _ in range(60))
    assert alarms <= 7, "60 x 0.05 = 3, and two standard deviations"


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.02, 0.2, 0.5])
@pytest.mark.parametrize("margin", [0.0, 0.02])
def test_the_false_alarm_rate_stays_below_alpha_over_500_long_runs(rate: float, margin: float) -> None:
    """On the edge of the hypothesis, the worst case."""
    rng = np.random.default_rng(5)
    alarms = sum(
        first_alarm(rng, (rate + margin, rate), 0.1, 2000, margin=margin, every=10) is not None for _ in range(500)
    )
    assert alarms / 500 <= ALPHA


def test_a_test_for_one_look_alarms_far_too_often_when_asked_all_the_time() -> None:
    """What the others are for: the pooled score test at 5 %, in the same runs."""
    rng, alarms = np.random.default_rng(5), 0
    for _ in range(300):
        is_canary = rng.random(2000) < 0.1
        bad = rng.random(2000) < 0.2
        looks = slice(199, None, 10)
        n, m = np.cumsum(is_canary)[looks], np.cumsum(~is_canary)[looks]
        s, t = np.cumsum(is_canary & bad)[looks], np.cumsum(~is_canary & bad)[looks]
        pooled = (s + t) / (n + m)
        z = (s / n - t / m) / np.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))
        alarms += bool((z > 1.645).any())
    assert alarms / 300 > 0.15


@pytest.mark.slow
def test_ratings_between_the_thumbs_raise_no_more_false_alarms() -> None:
    rng, alarms = np.random.default_rng(8), 0
    for _ in range(300):
        is_canary = rng.random(1000) < 0.2
        alarms += _first_alarm(is_canary, rng.choice([0.0, 0.25, 0.5, 1.0], 1000), 0.0, 5) is not None
    assert alarms / 300 <= ALPHA


def test_a_bad_canary_is_found_soon() -> None:
    """50 % thumbs down instead of 20 %, a tenth of the traffic: 9 of 10 within 1200 requests, 120 of them canary."""
    rng = np.random.default_rng(3)
    found = [first_alarm(rng, (0.5, 0.2), 0.1, 1200, every=10) for _ in range(40)]
    assert sum(alarm is not None for alarm in found) >= 36
    failing = [first_alarm(rng, (1.0, 0.0), 0.1, 300, every=1) for _ in range(20)]
    assert max(alarm or 10_000 for alarm in failing) <= 150, "an adapter that always fails costs a few requests"


def test_nothing_seen_is_no_evidence() -> None:
    assert log_e_value(Stream(0, 0), Stream(0, 0)) == pytest.approx(0.0, abs=1e-12)
    assert log_e_value(Stream(0, 0), Stream(500, 3)) <= 0.0
    assert always_valid_p(-3.0) == 1.0 and always_valid_p(log(20)) == pytest.approx(0.05)


def test_the_anytime_interval_is_what_the_test_does_not_reject() -> None:
    canary, stable = Stream(200, 60), Stream(1800, 180)
    low, high = anytime_interval(canary, stable, 0.05)
    assert 0 < low < 0.2 < high < 0.5
    assert log_e_value(canary, stable, low - 0.001) > log(40) > log_e_value(canary, stable, low + 0.001)
    assert log_e_value(stable, canary, -high - 0.001) > log(40) > log_e_value(stable, canary, -high + 0.001)
    wide = anytime_interval(Stream(20, 6), Stream(180, 18), 0.05)
    assert wide[0] < low and high < wide[1]
