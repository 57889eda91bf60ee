"""The controller against a simulated engine: it meets the target, recovers, does not swing, and knows its bounds."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from service.training_pace import BATCH, FLOOR, ROOM, PaceLimits, TrainingPace

ALONE = 0.020
"""A decode step that nothing disturbs, in seconds."""


class SimulatedEngine:
    """Decode steps that training disturbs in the share of time it runs, as on a machine: with luck and with noise."""

    def __init__(self, slowdown: float, seed: int = 1) -> None:
        self.slowdown = slowdown
        self._random = random.Random(seed)

    def step(self, ratio: float) -> float:
        return ALONE * (1 + self.slowdown * ratio) * self._random.gauss(1.0, 0.01)


def steer(pace: TrainingPace, step: Callable[[float], float], num_steps: int) -> list[float]:
    """The ratio after each of so many decode steps."""
    ratios = []
    for _ in range(num_steps):
        pace.observe([step(pace.ratio)])
        ratios.append(pace.ratio)
    return ratios


def p99_at(engine: SimulatedEngine, ratio: float) -> float:
    steps = sorted(engine.step(ratio) for _ in range(2000))
    return steps[int(0.99 * len(steps))]


@pytest.mark.parametrize("slowdown", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_settles_where_latency_keeps_to_the_target_and_most_of_what_that_allows_is_used(
    slowdown: float, seed: int
) -> None:
    engine, target = SimulatedEngine(slowdown, seed), 1.25 * ALONE
    pace = TrainingPace(PaceLimits(target))
    steer(pace, engine.step, 1500)
    settled = steer(pace, engine.step, 3000)
    best = min(1.0, 0.25 / slowdown)  # where a step without noise takes exactly the target
    assert p99_at(engine, sum(settled) / len(settled)) <= target
    assert sum(settled) / len(settled) >= 0.5 * best


@pytest.mark.parametrize("slowdown", [0.5, 2.0])
def test_it_does_not_swing_once_it_has_settled(slowdown: float) -> None:
    engine = SimulatedEngine(slowdown)
    pace = TrainingPace(PaceLimits(1.25 * ALONE))
    steer(pace, engine.step, 3000)
    settled = steer(pace, engine.step, 3000)
    assert max(settled) / min(settled) < 1.5


def test_a_target_that_training_does_not_touch_leaves_it_alone() -> None:
    pace = TrainingPace(PaceLimits(2 * ALONE))
    assert set(steer(pace, SimulatedEngine(0.3).step, 2000)) == {1.0}


def test_it_answers_a_heavier_load_within_some_steps_and_recovers_when_it_is_over() -> None:
    engine = SimulatedEngine(0.1)
    pace = TrainingPace(PaceLimits(1.25 * ALONE))
    assert steer(pace, engine.step, 1000)[-1] == 1.0
    engine.slowdown = 2.0
    heavy = steer(pace, engine.step, 200)
    assert p99_at(engine, heavy[-1]) <= 1.35 * ALONE
    engine.slowdown = 0.1
    assert steer(pace, engine.step, 30 * BATCH)[-1] == 1.0


def test_after_a_move_it_moves_one_way_until_it_has_passed_the_target() -> None:
    pace = TrainingPace(PaceLimits(1.25 * ALONE))
    down = steer(pace, lambda ratio: ALONE * (1 + 2 * ratio), 40)
    passed = next(i for i, ratio in enumerate(down) if ALONE * (1 + 2 * ratio) <= 1.25 * ALONE)
    assert down[:passed] == sorted(down[:passed], reverse=True)


def test_more_patience_with_latency_never_means_less_training() -> None:
    def settled(target: float) -> float:
        pace = TrainingPace(PaceLimits(target))
        steer(pace, SimulatedEngine(2.0).step, 2000)
        return sum(ratios := steer(pace, SimulatedEngine(2.0).step, 2000)) / len(ratios)

    shares = [settled(factor * ALONE) for factor in (1.1, 1.3, 1.6, 2.2, 3.5)]
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_an_impossible_target_leaves_the_floor_and_never_less() -> None:
    pace = TrainingPace(PaceLimits(0.5 * ALONE))
    ratios = steer(pace, SimulatedEngine(1.0).step, 500)
    assert ratios[-1] == min(ratios) == FLOOR


def test_one_slow_step_among_a_hundred_is_what_a_99th_percentile_forgives() -> None:
    pace = TrainingPace(PaceLimits(1.25 * ALONE))
    for _ in range(20):
        pace.observe([ALONE] * (BATCH - 1) + [50 * ALONE])
    assert pace.ratio == 1.0
    pace.observe([ALONE, 50 * ALONE, ALONE, 50 * ALONE])
    assert pace.ratio < 1.0


def test_between_room_and_target_nothing_moves() -> None:
    pace = TrainingPace(PaceLimits(0.5 * ALONE))
    steer(pace, lambda ratio: ALONE, 100)
    between = 0.5 * ALONE * (1 + ROOM) / 2
    assert set(steer(pace, lambda ratio: between, 1000)) == {FLOOR}
    assert steer(pace, lambda ratio: 0.5 * ALONE * ROOM * 0.99, 2 * BATCH)[-1] > FLOOR


def test_without_a_target_the_share_is_all_that_counts() -> None:
    pace = TrainingPace(PaceLimits(None, share=0.4))
    assert set(steer(pace, SimulatedEngine(9.0).step, 500)) == {0.4}
    assert pace.p99_seconds is not None and pace.p99_seconds > 4 * ALONE


def test_the_share_bounds_the_target_from_above_and_the_floor_from_below() -> None:
    assert set(steer(TrainingPace(PaceLimits(9 * ALONE, share=0.3)), SimulatedEngine(1.0).step, 500)) == {0.3}
    assert steer(TrainingPace(PaceLimits(ALONE / 2, share=0.01)), SimulatedEngine(1.0).step, 500)[-1] == 0.01
    assert steer(TrainingPace(PaceLimits(ALONE / 2, share=0.0)), SimulatedEngine(1.0).step, 500)[-1] == 0.0


def test_priorities_alone_arbitrate_only_when_nothing_is_limited() -> None:
    assert PaceLimits(None).hold_nothing
    assert not PaceLimits(0.05).hold_nothing and not PaceLimits(None, share=0.9).hold_nothing
