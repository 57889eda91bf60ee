"""Intervals and p-values against tables, against numerical integration and against simulation."""

from __future__ import annotations

import numpy as np
import pytest

from service.intervals import (
    Moments,
    difference_of_means,
    difference_of_rates,
    mean_of,
    t_quantile,
    t_tail,
    wilson,
)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (5, 2.5706), (10, 2.2281), (30, 2.0423), (120, 1.9799)]
)
def test_students_quantiles_are_those_of_the_tables(freedom: float, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, abs=2e-4)
    assert t_tail(quantile, freedom) == pytest.approx(0.05, abs=2e-5)


@pytest.mark.parametrize("freedom", [1.3, 3.7, 45.2, 900.0])
def test_students_tail_for_broken_degrees_of_freedom_equals_the_integral_of_its_density(freedom: float) -> None:
    x = np.tan((np.arange(400_000) + 0.5) / 400_000 * np.pi / 2)
    density = (1 + x * x / freedom) ** (-(freedom + 1) / 2) * (1 + x * x)
    assert t_tail(2.0, freedom) == pytest.approx(density[x > 2.0].sum() / density.sum(), rel=1e-3)


def test_wilson_and_newcombe_give_the_published_examples() -> None:
    """Newcombe, Statistics in Medicine 17 (1998): 81/263 in part I; 56/70 against 48/80, table II (a) in part II."""
    assert wilson(Moments(263, 81, 81)) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    difference = difference_of_rates(Moments(70, 56, 56), Moments(80, 48, 48))
    assert difference.value == pytest.approx(0.2)
    assert difference.interval == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert difference.p_value == pytest.approx(0.0082, abs=3e-4)


def test_welch_covers_the_truth_nineteen_times_in_twenty() -> None:
    rng, covered = np.random.default_rng(2), 0
    for _ in range(400):
        first, second = Moments.of(rng.normal(1.0, 3.0, 8)), Moments.of(rng.normal(0.0, 0.5, 25))
        interval = difference_of_means(first, second).interval
        assert interval is not None
        covered += interval[0] <= 1.0 <= interval[1]
    assert 364 <= covered <= 394


def test_a_p_value_is_small_exactly_when_the_interval_leaves_zero_out() -> None:
    rng = np.random.default_rng(4)
    for shift in rng.normal(0, 0.5, 100):
        difference = difference_of_means(Moments.of(rng.normal(shift, 1, 20)), Moments.of(rng.normal(0, 1, 30)))
        assert difference.interval is not None and difference.p_value is not None
        assert (difference.p_value < 0.05) == (not difference.interval[0] <= 0 <= difference.interval[1])


def test_too_little_data_gives_no_interval_and_no_error() -> None:
    none, one = Moments(), Moments.of([1.0])
    assert wilson(none) is None
    assert difference_of_rates(none, one).value is None
    assert difference_of_means(one, none).value is None
    assert difference_of_means(one, one).interval is None
    assert mean_of(one).value == 1.0 and mean_of(one).interval is None
    assert mean_of(Moments.of([2.0, 2.0])).p_value == 0.0
    assert difference_of_means(Moments.of([2.0, 2.0]), Moments.of([2.0, 2.0])).p_value == 1.0
