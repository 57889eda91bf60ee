"""What came back, counted: answers by operation and kind, times, and what should not have been. Knows no HTTP."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

MAX_SHOWN = 10
"""Violations of a kind that are kept with their text; all are counted."""


@dataclass
class Ledger:
    answers: Counter[tuple[str, str]] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    """What was looked at and found right, by name."""
    whole: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    first: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    violations: list[str] = field(default_factory=list)
    num_violations: int = 0

    def count(self, operation: str, kind: str) -> None:
        self.answers[operation, kind] += 1

    def took(self, operation: str, seconds: float, first_token: float | None = None) -> None:
        self.whole[operation].append(seconds)
        if first_token is not None:
            self.first[operation].append(first_token)

    def violation(self, text: str) -> None:
        self.num_violations += 1
        kind = text.partition(":")[0]
        if sum(one.startswith(kind) for one in self.violations) < MAX_SHOWN:
            self.violations.append(text)

    def expect(self, holds: bool, check: str, what: object = "") -> bool:
        """`check` is a thing that has to hold; says whether it does."""
        if holds:
            self.checks[check] += 1
        else:
            self.violation(f"{check}: {str(what)[:400]}")
        return holds

    @property
    def num_requests(self) -> int:
        return sum(self.answers.values())

    def summary(self) -> dict[str, Any]:
        operations = sorted({operation for operation, _ in self.answers})
        kinds: dict[str, dict[str, int]] = {operation: {} for operation in operations}
        for (operation, kind), number in sorted(self.answers.items()):
            kinds[operation][kind] = number
        return {
            "requests": self.num_requests,
            "answers": kinds,
            "whole_seconds": {name: percentiles(values) for name, values in sorted(self.whole.items())},
            "first_token_seconds": {name: percentiles(values) for name, values in sorted(self.first.items())},
            "checks": dict(sorted(self.checks.items())),
            "num_violations": self.num_violations,
            "violations": self.violations,
        }


def percentiles(values: list[float]) -> dict[str, float]:
    """Median and 99th percentile, the nearest that was seen."""
    ordered = sorted(values)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4)

    return {"n": len(ordered), "p50": at(0.50), "p99": at(0.99), "max": round(ordered[-1], 4)}
