"""What passes the gate under which policy, and the reasons it gives."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from adapters.evaluation_report import ACTIVE, BASE, CANDIDATE, FEW_SHOT, EvaluationReport, Forgetting
from adapters.gate import FewExamples, GatePolicy, judge
from adapters.scoring import TaskKind
from adapters.slices import Slice
from adapters.statistics import Comparison, Estimate

BETTER = Comparison(0.3, 0.2, 0.4, 0.001)
PERHAPS = Comparison(0.05, -0.02, 0.12, 0.2)
SAME = Comparison(0.0, -0.05, 0.05, 1.0)
WORSE = Comparison(-0.2, -0.3, -0.1, 0.001)
PERHAPS_WORSE = Comparison(-0.02, -0.08, 0.04, 0.5)


def _report(
    base: Comparison = BETTER,
    few_shot: Comparison = BETTER,
    active: Comparison | None = None,
    num_examples: int = 100,
    forgetting: float = 1.5,
    worst_slice: float = 0.6,
    assertions: float | None = None,
) -> EvaluationReport:
    against = {BASE: base, FEW_SHOT: few_shot} | ({} if active is None else {ACTIVE: active})
    scores: dict[str, dict[str, Estimate]] = {name: {"accuracy": Estimate(0.5, 0.4, 0.6)} for name in against}
    scores[CANDIDATE] = {"accuracy": Estimate(0.8, 0.7, 0.9)}
    if assertions is not None:
        scores[CANDIDATE]["assertions"] = Estimate(assertions, 0.0, 1.0)
    return EvaluationReport(
        task=TaskKind.LABELS,
        num_examples=num_examples,
        num_left_out=0,
        num_shots=8,
        scores=scores,
        comparisons={name: {"accuracy": found} for name, found in against.items()},
        slices=(Slice("label", "refund", 9, Estimate(worst_slice, 0.2, 0.9), 0.1),),
        forgetting=Forgetting(48, 60.0, 60.0 * forgetting, forgetting, forgetting - 0.1, forgetting + 0.1),
    )


@pytest.mark.parametrize(
    ("report", "policy", "passed", "needed", "said"),
    [
        (_report(), {}, True, True, None),
        (_report(base=PERHAPS), {}, False, False, "against the base alone: accuracy +0.050 [-0.020, +0.120], p = 0.2"),
        (_report(few_shot=SAME), {}, False, False, "fine-tuning was not needed: the base with examples"),
        (_report(few_shot=WORSE), {}, False, False, "fine-tuning was not needed"),
        (_report(few_shot=SAME), {"min_gain_over_few_shot": None}, True, False, "fine-tuning was not needed"),
        (_report(few_shot=SAME), {"min_gain_over_few_shot": -0.1}, True, False, "does as well"),
        (_report(few_shot=SAME), {"min_gain_over_few_shot": -0.01}, False, False, "asked for -0.010"),
        (_report(base=PERHAPS), {"max_p": 0.3}, True, True, None),
        (_report(), {"min_gain_over_base": 0.3}, True, True, None),
        (_report(), {"min_gain_over_base": 0.31}, False, True, "asked for +0.310 with p <= 0.05"),
        (_report(active=BETTER), {}, True, True, None),
        (_report(active=PERHAPS_WORSE), {}, True, True, None),
        (_report(active=WORSE), {}, False, True, "against the active version: accuracy -0.200"),
        (_report(active=WORSE), {"must_not_lose_to_active": False}, True, True, None),
        (_report(active=PERHAPS), {"min_gain_over_active": 0.0}, False, True, "against the active version"),
        (_report(), {"max_forgetting": 1.5}, True, True, None),
        (_report(), {"max_forgetting": 1.4}, False, True, "perplexity on general text x 1.50, at most x 1.4"),
        (_report(), {"min_worst_slice": 0.6}, True, True, None),
        (_report(), {"min_worst_slice": 0.7}, False, True, "worst slice label='refund' (9 examples): accuracy 0.600"),
        (_report(assertions=0.9), {"min_assertions": 0.95}, False, True, "assertions hold for 90.0%"),
        (_report(assertions=0.96), {"min_assertions": 0.95}, True, True, None),
        (_report(), {"min_assertions": 0.95}, False, True, "there are no assertions"),
        (_report(base=WORSE), {"enabled": False}, True, False, "the gate is off"),
    ],
)
def test_a_candidate_is_judged_by_the_policy(
    report: EvaluationReport, policy: dict[str, Any], passed: bool, needed: bool, said: str | None
) -> None:
    verdict = judge(report, replace(GatePolicy(), **policy))
    assert (verdict.passed, verdict.fine_tuning_needed) == (passed, needed)
    if said is None:
        assert verdict.reasons == ()
    else:
        assert any(said in reason for reason in verdict.reasons), verdict.reasons
    assert json.loads(json.dumps(verdict.as_dict()))["passed"] is passed


@pytest.mark.parametrize(
    ("few_examples", "first", "passed"),
    [
        (FewExamples.PASS_IF_FIRST, True, True),
        (FewExamples.PASS_IF_FIRST, False, False),
        (FewExamples.PASS, False, True),
        (FewExamples.HOLD, True, False),
    ],
)
def test_few_examples_are_insufficient_evidence_and_the_policy_says_what_follows(
    few_examples: FewExamples, first: bool, passed: bool
) -> None:
    clear = Comparison(1.0, 1.0, 1.0, 0.125)
    report = _report(base=clear, few_shot=clear, num_examples=4)
    verdict = judge(report, GatePolicy(few_examples=few_examples), first=first)
    assert verdict.passed is passed
    assert verdict.fine_tuning_needed is None
    assert verdict.reasons == ("insufficient evidence: 4 examples, the policy asks for 20",)


def test_few_examples_excuse_no_candidate_that_looks_worse() -> None:
    report = _report(base=SAME, num_examples=4)
    verdict = judge(report, GatePolicy(few_examples=FewExamples.PASS))
    assert not verdict.passed and verdict.fine_tuning_needed is False


def test_few_examples_excuse_no_candidate_that_looks_worse_than_the_active_version() -> None:
    report = _report(active=PERHAPS_WORSE, num_examples=4)
    assert not judge(report, GatePolicy(few_examples=FewExamples.PASS), first=False).passed


def test_without_an_evaluation_nothing_passes_but_a_gate_that_is_off() -> None:
    verdict = judge(None, GatePolicy())
    assert not verdict.passed
    assert verdict.reasons == ("insufficient evidence: the model could not be evaluated",)
    assert judge(None, GatePolicy(enabled=False)).passed


def test_a_policy_survives_json() -> None:
    policy = GatePolicy(max_forgetting=2.0, few_examples=FewExamples.HOLD)
    assert GatePolicy.from_dict(json.loads(json.dumps(policy.as_dict()))) == policy
