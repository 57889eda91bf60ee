"""The JSON of a canary or a shadow with what it has shown so far. Knows no route and no database."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from service.experiment import MEASURES, Arm, Experiment, ExperimentKind, Measure, Measured
from service.intervals import Difference, Moments, difference_of_means, difference_of_rates, mean_of, wilson
from service.verdict import Judged, judged

RATES = frozenset({Measure.ERROR, Measure.ABORTED, Measure.LENGTH, Measure.AGREED, Measure.DROPPED})
"""Measures of 0s and 1s."""

NAMES = {
    Measure.ERROR: "error_rate",
    Measure.ABORTED: "aborted_rate",
    Measure.LENGTH: "length_rate",
    Measure.SECONDS: "latency_seconds",
    Measure.TOKENS: "completion_tokens",
    Measure.DOWN: "down_share",
    Measure.RATING: "rating",
    Measure.NLL: "nll_per_token",
    Measure.AGREED: "agreement_rate",
    Measure.DROPPED: "dropped_rate",
    Measure.SECONDS_DIFFERENCE: "latency_seconds",
    Measure.TOKENS_DIFFERENCE: "completion_tokens",
}
"""How a measure is called outside."""

_PAIRED = (Measure.SECONDS_DIFFERENCE, Measure.TOKENS_DIFFERENCE)


def experiment_body(experiment: Experiment, measures: Measured) -> dict[str, Any]:
    body: dict[str, Any] = {
        "id": experiment.id,
        "object": "alias.experiment",
        "kind": experiment.kind,
        "alias": experiment.alias,
        "model": experiment.model,
        "digest": experiment.digest,
        "stable_model": experiment.stable_model,
        "stable_digest": experiment.stable_digest,
        "percent": experiment.percent,
        "status": "running" if experiment.is_running else "ended",
        "outcome": experiment.outcome,
        "reason": experiment.reason,
        "created_at": int(experiment.created_at),
        "ended_at": None if experiment.ended_at is None else int(experiment.ended_at),
        "arms": {arm: _arm_body(experiment.kind, arm, measures) for arm in MEASURES[experiment.kind]},
    }
    if experiment.policy is not None:
        body["policy"] = asdict(experiment.policy)
        body["comparison"] = {
            NAMES[measure]: _difference_body(_difference(measure, measures))
            for measure in MEASURES[experiment.kind][Arm.CANARY]
        }
        body["tests"] = {NAMES[test.measure]: _test_body(test) for test in judged(measures, experiment.policy)}
    else:
        body["comparison"] = {
            NAMES[measure]: _difference_body(mean_of(measures[Arm.SHADOW, measure])) for measure in _PAIRED
        }
    return body


def _arm_body(kind: ExperimentKind, arm: Arm, measures: Measured) -> dict[str, Any]:
    shown = [measure for measure in MEASURES[kind][arm] if measure not in _PAIRED]
    body: dict[str, Any] = {"requests": _num_requests(kind, arm, measures)}
    if (length := measures.get((arm, Measure.LENGTH))) is not None:
        cut = round(length.total)
        body["finish_reasons"] = {"stop": length.count - cut, "length": cut}
    for measure in shown:
        body[NAMES[measure]] = _value_body(measure, measures[arm, measure])
    return body


def _num_requests(kind: ExperimentKind, arm: Arm, measures: Measured) -> int:
    counted = Measure.ABORTED if kind is ExperimentKind.CANARY else Measure.SECONDS
    if arm is Arm.SHADOW:
        counted = Measure.DROPPED
    return measures[arm, counted].count


def _value_body(measure: Measure, moments: Moments) -> dict[str, Any]:
    """With `count`, how many numbers it rests on, and its own 95 % interval."""
    interval = wilson(moments) if measure in RATES else mean_of(moments).interval
    return {"value": moments.mean, "count": moments.count, "interval": interval}


def _difference(measure: Measure, measures: Measured) -> Difference:
    canary, stable = measures[Arm.CANARY, measure], measures[Arm.STABLE, measure]
    return difference_of_rates(canary, stable) if measure in RATES else difference_of_means(canary, stable)


def _difference_body(difference: Difference) -> dict[str, Any]:
    return {"difference": difference.value, "interval": difference.interval, "p_value": difference.p_value}


def _test_body(test: Judged) -> dict[str, Any]:
    return {
        "e_value": test.e_value,
        "threshold": 1.0 / test.alpha,
        "anytime_p_value": test.p_value,
        "anytime_interval": test.interval,
    }
