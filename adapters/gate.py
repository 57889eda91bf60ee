"""Decides from an evaluation whether a candidate may replace what answers now. Pure; knows no alias and no database."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from adapters.evaluation_report import ACTIVE, BASE, CANDIDATE, FEW_SHOT, EvaluationReport
from adapters.statistics import Comparison


class FewExamples(StrEnum):
    """What to do with a candidate that looks better on too few examples to be sure."""

    PASS = "pass"
    HOLD = "hold"
    PASS_IF_FIRST = "pass_if_first"
    """Pass when nothing answers under the alias yet: there is nothing to lose."""


@dataclass(frozen=True)
class GatePolicy:
    """What a candidate must show, on the task's primary metric (0..1, see `adapters.scoring`); None: not asked.

    A minimum gain of 0 or more asks for a gain that is also significant (`max_p`). A negative one is a margin for "not
    worse": the interval of the difference must not reach below it.
    """

    enabled: bool = True
    """False: every job that succeeds moves its alias."""
    min_gain_over_base: float | None = 0.0
    min_gain_over_few_shot: float | None = 0.0
    max_p: float = 0.05
    """Two-sided, of the paired test."""
    must_not_lose_to_active: bool = True
    """Not significantly worse than the version that the alias points at."""
    min_gain_over_active: float | None = None
    max_forgetting: float | None = None
    """Perplexity on general text over the base's. Not asked by default: the base itself stays and answers whoever asks
    for it, and a narrow adapter may forget what its task does not need. Ask for it where an adapter also chats."""
    min_worst_slice: float | None = None
    """The candidate's value on its worst slice."""
    min_assertions: float | None = None
    """Share of the examples with assertions whose answers pass them all."""
    min_examples: int = 20
    """Fewer are insufficient evidence, whatever they show."""
    few_examples: FewExamples = FewExamples.PASS_IF_FIRST

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GatePolicy:
        return cls(**{**values, "few_examples": FewExamples(values.get("few_examples", FewExamples.PASS_IF_FIRST))})


@dataclass(frozen=True)
class Check:
    """One condition of the policy; `detail` gives the figures."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class GateVerdict:
    """`reasons`: why it did not pass, or what to know although it did. `fine_tuning_needed` is False when prompting the
    base, with examples or without, does as well; None when that cannot be told."""

    passed: bool
    reasons: tuple[str, ...]
    fine_tuning_needed: bool | None
    checks: tuple[Check, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(report: EvaluationReport | None, policy: GatePolicy, *, first: bool = True) -> GateVerdict:
    """`first`: nothing answers under the alias yet. Without a report nothing is known, and nothing passes."""
    if not policy.enabled:
        return GateVerdict(True, ("the gate is off",), None if report is None else _needed(report, policy))
    if report is None:
        return GateVerdict(False, ("insufficient evidence: the model could not be evaluated",), None)
    enough = report.num_examples >= policy.min_examples
    checks = _gains(report, policy, enough) + _limits(report, policy)
    reasons = [check.detail for check in checks if not check.passed]
    needed = _needed(report, policy)
    if needed is False:
        reasons.append("fine-tuning was not needed: " + _as_good(report, policy))
    passed = all(check.passed for check in checks)
    if not enough:
        reasons.append(
            f"insufficient evidence: {report.num_examples} examples, the policy asks for {policy.min_examples}"
        )
        lenient = policy.few_examples is FewExamples.PASS or (
            policy.few_examples is FewExamples.PASS_IF_FIRST and first
        )
        passed = passed and lenient
    return GateVerdict(passed, tuple(reasons), needed, tuple(checks))


def _gains(report: EvaluationReport, policy: GatePolicy, enough: bool) -> list[Check]:
    """With too few examples significance is out of reach, so the figures alone decide these."""
    wanted = (
        (BASE, policy.min_gain_over_base),
        (FEW_SHOT, policy.min_gain_over_few_shot),
        (ACTIVE, policy.min_gain_over_active),
    )
    checks = [
        _gain(report, other, minimum, policy.max_p if enough else None)
        for other, minimum in wanted
        if minimum is not None and other in report.comparisons
    ]
    if policy.must_not_lose_to_active and ACTIVE in report.comparisons:
        found = report.comparisons[ACTIVE][report.primary]
        loses = found.gain < 0 and (found.p <= policy.max_p or not enough)
        checks.append(
            Check("must_not_lose_to_active", not loses, f"against the active version: {_figures(report, found)}")
        )
    return checks


def _gain(report: EvaluationReport, other: str, minimum: float, max_p: float | None) -> Check:
    found = report.comparisons[other][report.primary]
    if minimum < 0:
        passed = (found.low if max_p is not None else found.gain) >= minimum
    else:
        passed = found.gain > 0 and found.gain >= minimum and (max_p is None or found.p <= max_p)
    detail = f"against {_NAMES[other]}: {_figures(report, found)}, asked for {minimum:+.3f}"
    return Check(
        f"min_gain_over_{other}",
        passed,
        detail + (f" with p <= {max_p:g}" if max_p is not None and minimum >= 0 else ""),
    )


def _limits(report: EvaluationReport, policy: GatePolicy) -> list[Check]:
    checks = []
    if policy.max_forgetting is not None:
        found = report.forgetting
        detail = (
            "forgetting was not measured"
            if found is None
            else (f"perplexity on general text x {found.ratio:.2f}, at most x {policy.max_forgetting:g} is allowed")
        )
        checks.append(Check("max_forgetting", found is not None and found.ratio <= policy.max_forgetting, detail))
    if policy.min_worst_slice is not None:
        if not report.slices:
            detail = "no slice is large enough to judge"
            checks.append(Check("min_worst_slice", True, detail))
        else:
            worst = report.slices[0]
            name = f"{worst.field}={worst.value!r} ({worst.num_examples} examples)"
            detail = (
                f"worst slice {name}: {report.primary} {worst.score.value:.3f}, asked for {policy.min_worst_slice:g}"
            )
            checks.append(Check("min_worst_slice", worst.score.value >= policy.min_worst_slice, detail))
    if policy.min_assertions is not None:
        rate = report.scores[CANDIDATE].get("assertions")
        detail = (
            "there are no assertions"
            if rate is None
            else (f"assertions hold for {rate.value:.1%} of the answers, asked for {policy.min_assertions:.1%}")
        )
        checks.append(Check("min_assertions", rate is not None and rate.value >= policy.min_assertions, detail))
    return checks


def _needed(report: EvaluationReport, policy: GatePolicy) -> bool | None:
    """Whether the adapter is better than base and few-shot prompt both, beyond chance."""
    compared = [report.comparisons[other][report.primary] for other in (BASE, FEW_SHOT) if other in report.comparisons]
    if not compared:
        return None
    if any(found.gain <= 0 for found in compared):
        return False
    if report.num_examples < policy.min_examples:
        return None
    return all(found.p <= policy.max_p for found in compared)


def _as_good(report: EvaluationReport, policy: GatePolicy) -> str:
    """Which of the two does as well, and how well."""
    for other in (BASE, FEW_SHOT):
        if other in report.comparisons:
            found = report.comparisons[other][report.primary]
            if found.gain <= 0 or found.p > policy.max_p:
                mine, its = (report.scores[name][report.primary].value for name in (CANDIDATE, other))
                return (
                    f"{_NAMES[other]} does as well ({report.primary} {its:.3f} against {mine:.3f}, p = {found.p:.3f})"
                )
    return ""


_NAMES = {BASE: "the base alone", FEW_SHOT: "the base with examples in its prompt", ACTIVE: "the active version"}


def _figures(report: EvaluationReport, found: Comparison) -> str:
    return f"{report.primary} {found.gain:+.3f} [{found.low:+.3f}, {found.high:+.3f}], p = {found.p:.3f}"
