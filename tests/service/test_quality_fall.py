"""The test for falling quality: it keeps its promise, finds falls, and agrees with its definition computed plainly."""

from __future__ import annotations

import random
from math import log

import pytest

from service.quality_fall import (
    BASELINE_BLOCKS,
    BLOCK_SIZE,
    MAX_STREAMS,
    baseline_of,
    find_fall,
    summed,
)
from service.sequential_test import Stream, log_e_value


def blocks_of(values: list[float]) -> list[Stream]:
    cut = (values[start : start + BLOCK_SIZE] for start in range(0, len(values), BLOCK_SIZE))
    return [Stream(len(block), sum(block)) for block in cut]


def draws(rng: random.Random, rate: float, count: int) -> list[float]:
    return [float(rng.random() < rate) for _ in range(count)]


def when_called(values: list[float], alpha: float) -> int | None:
    """After how many numbers a fall is certain, looking after each block."""
    for end in range(0, len(values) + 1, BLOCK_SIZE):
        fall = find_fall(blocks_of(values[:end]), alpha)
        if fall is not None and fall.is_certain:
            return end
    return None


@pytest.mark.slow
def test_without_a_fall_it_is_called_as_rarely_as_promised() -> None:
    """At alpha 0.2, so that the promise is not kept by doing nothing: of 300 versions, at most 60 and some chance."""
    rng = random.Random(5)
    called = sum(when_called(draws(rng, 0.7, 800), alpha=0.2) is not None for _ in range(300))
    assert called <= 60


@pytest.mark.parametrize("good_for", [100, 1500])
def test_a_fall_is_found_however_long_quality_was_good(good_for: int) -> None:
    delays = []
    for seed in range(20):
        rng = random.Random(seed)
        values = draws(rng, 0.92, 100 + good_for) + draws(rng, 0.55, 600)
        called = when_called(values, alpha=0.01)
        assert called is not None
        delays.append(called - 100 - good_for)
    assert 0 < sorted(delays)[10] <= 150


def test_an_improvement_is_no_fall() -> None:
    rng = random.Random(1)
    fall = find_fall(blocks_of(draws(rng, 0.6, 100) + draws(rng, 0.95, 500)))
    assert fall is not None and not fall.is_certain and fall.p_value == 1.0


def test_nothing_is_compared_before_the_baseline_is_whole() -> None:
    ones = [1.0] * (BASELINE_BLOCKS * BLOCK_SIZE)
    assert baseline_of(blocks_of(ones[:-1])) is None and find_fall(blocks_of(ones[:-1])) is None
    assert baseline_of(blocks_of(ones)) == Stream(100, 100.0) and find_fall(blocks_of(ones)) is None
    assert find_fall(blocks_of([*ones, 0.0])) is not None


def test_it_is_the_strongest_of_all_streams_since_a_blocks_start() -> None:
    rng = random.Random(2)
    for count in (130, 180, 400, 900):
        blocks = blocks_of(draws(rng, 0.8, 100) + draws(rng, 0.7, count - 100))
        baseline, later = summed(blocks[:BASELINE_BLOCKS]), blocks[BASELINE_BLOCKS:]
        assert len(later) <= MAX_STREAMS
        margins = []
        for start in range(len(later)):
            number = start + 1
            threshold = log(number * (number + 1) / 0.01)
            margins.append(log_e_value(baseline, summed(later[start:])) - threshold)
        found = find_fall(blocks)
        assert found is not None and found.log_e - found.log_threshold == pytest.approx(max(margins))
