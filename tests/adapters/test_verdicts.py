"""Losses of runs that went well, too far, not far enough, or nowhere."""

from __future__ import annotations

import pytest

from adapters.verdicts import Fit, judge_training


def _falling(count: int, first: float = 3.0, last: float = 0.5) -> list[float]:
    return [first + (last - first) * index / (count - 1) for index in range(count)]


@pytest.mark.parametrize(
    ("train", "valid", "fit", "said"),
    [
        (_falling(40), {10: 2.0, 20: 1.0, 30: 0.8, 40: 0.79}, Fit.GOOD, "step 40"),
        (_falling(40), {10: 2.0, 20: 1.0, 30: 1.2, 40: 1.5}, Fit.OVERFIT, "best at step 20 (1.000) and rose to 1.500"),
        ([3.0] * 40, {10: 2.0, 20: 1.0, 30: 1.2, 40: 1.5}, Fit.UNDERFIT, "hardly fell"),
        (_falling(40), {10: 3.0, 20: 2.5, 30: 2.0, 40: 1.5}, Fit.UNDERFIT, "still falling"),
        ([3.0, 2.99] * 20, {10: 3.0, 20: 3.0, 30: 3.0, 40: 3.0}, Fit.UNDERFIT, "hardly fell"),
        (_falling(40), {40: 0.5}, Fit.UNKNOWN, "too few"),
        (_falling(40), {10: 1.0, 20: 0.2, 30: 0.043, 40: 0.009}, Fit.GOOD, "step 40"),
        (_falling(40, 0.02, 0.001), {10: 0.002, 20: 0.001, 30: 0.003, 40: 0.004}, Fit.GOOD, "step 20"),
    ],
)
def test_a_run_is_judged_by_its_losses(train: list[float], valid: dict[int, float], fit: Fit, said: str) -> None:
    verdict = judge_training(train, valid)
    assert verdict.fit is fit
    assert said in verdict.reason
    assert (verdict.advice is None) is (fit in (Fit.GOOD, Fit.UNKNOWN))


def test_steps_that_were_skipped_are_what_to_look_at_first() -> None:
    train = [float("nan") if index % 5 == 0 else 1.0 for index in range(40)]
    assert judge_training(train, {10: 1.0, 20: 1.0, 30: 1.0}, num_skipped=8).fit is Fit.UNSTABLE


def test_one_skipped_step_is_no_verdict() -> None:
    train = [float("nan"), *_falling(40)]
    verdict = judge_training(train, {10: 2.0, 20: 1.0, 30: float("nan"), 40: 0.98}, num_skipped=1)
    assert verdict.fit is Fit.GOOD
