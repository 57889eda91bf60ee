"""What a canary's numbers say so far: go on, take it back, or promote it. Only arithmetic; acts on nothing.

Two sequential tests (`service.sequential_test`), each at half of the policy's alpha: are its errors more frequent
than the stable arm's, is its feedback worse? Asked as often as one likes, a canary that is no worse is rolled back with
a probability of at most alpha. Promotion wants both opposites proven, each at alpha: not worse by the margin or more.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

from service.experiment import Arm, CanaryPolicy, Measure, Measured, Outcome
from service.sequential_test import Stream, always_valid_p, anytime_interval, e_value, log_e_value


@dataclass(frozen=True)
class Judged:
    """One test at this moment. `difference` is canary minus stable, its interval holds at all times at once."""

    measure: Measure
    canary: Stream
    stable: Stream
    log_e: float
    log_threshold: float
    alpha: float

    @property
    def is_worse(self) -> bool:
        return self.log_e >= self.log_threshold

    @property
    def e_value(self) -> float:
        return e_value(self.log_e)

    @property
    def p_value(self) -> float:
        return always_valid_p(self.log_e)

    @property
    def interval(self) -> tuple[float, float]:
        return anytime_interval(self.canary, self.stable, self.alpha)


@dataclass(frozen=True)
class Verdict:
    outcome: Outcome
    measure: Measure | None
    reason: str


def judged(measures: Measured, policy: CanaryPolicy) -> tuple[Judged, Judged]:
    """Of errors and of feedback."""
    tolerated = ((Measure.ERROR, policy.max_error_increase), (Measure.DOWN, policy.max_down_increase))
    first, second = (_judge(measures, policy, measure, margin) for measure, margin in tolerated)
    return first, second


def verdict(measures: Measured, policy: CanaryPolicy) -> Verdict | None:
    """None: go on."""
    tests = judged(measures, policy)
    for test in tests:
        if _enough(test, policy) and test.is_worse:
            return Verdict(Outcome.ROLLED_BACK, test.measure, _why_back(test))
    if policy.auto_promote and all(_enough(test, policy) and _no_worse(test, policy) for test in tests):
        return Verdict(
            Outcome.PROMOTED, None, f"Errors and feedback are worse by less than {policy.promote_margin:g}, for sure."
        )
    return None


def stream(measures: Measured, arm: Arm, measure: Measure) -> Stream:
    moments = measures[arm, measure]
    return Stream(moments.count, min(max(moments.total, 0.0), moments.count))


def _judge(measures: Measured, policy: CanaryPolicy, measure: Measure, margin: float) -> Judged:
    canary, stable = stream(measures, Arm.CANARY, measure), stream(measures, Arm.STABLE, measure)
    alpha = policy.alpha / 2
    return Judged(measure, canary, stable, log_e_value(canary, stable, margin), log(1 / alpha), alpha)


def _enough(test: Judged, policy: CanaryPolicy) -> bool:
    return min(test.canary.count, test.stable.count) >= policy.min_samples


def _no_worse(test: Judged, policy: CanaryPolicy) -> bool:
    """Evidence against "the canary's mean is higher by the margin or more"."""
    return log_e_value(test.stable, test.canary, -policy.promote_margin) >= log(1 / policy.alpha)


def _why_back(test: Judged) -> str:
    what = {Measure.ERROR: "Errors are more frequent", Measure.DOWN: "Feedback is worse"}[test.measure]
    name = {Measure.ERROR: "failed answers", Measure.DOWN: "thumbs down"}[test.measure]
    return (
        f"{what} with the canary: {_share(test.canary)} {name} against {_share(test.stable)}"
        f" (always-valid p = {test.p_value:.2g})."
    )


def _share(arm: Stream) -> str:
    return f"{100 * arm.mean:.3g} % of {arm.count:.0f}"
