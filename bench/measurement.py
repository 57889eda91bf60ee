"""Rounds, medians and ratios. Knows no model and no clock.

Variants are run in turn within every round (A B C, A B C, ...) and a ratio is taken within its round, so what slows
the whole machine for a while slows both sides of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

Samples = Mapping[str, Sequence[float]]
"""Every quantity's value in every round."""

Variant = Callable[[], Mapping[str, float]]
"""Measures once; returns quantities by name."""


@dataclass(frozen=True)
class Goal:
    """What to pass, and the best that others are known for. From the project's list of references.

    "±" is how far from 1 a ratio may be.
    """

    relation: Literal["≥", "≤", "±"]
    bound: float
    reference: str

    def met(self, value: float) -> bool:
        if self.relation == "±":
            return abs(value - 1) <= self.bound
        return value >= self.bound if self.relation == "≥" else value <= self.bound

    def __str__(self) -> str:
        if self.relation == "±":
            return f"1 ± {self.bound:g}"
        return f"{self.relation} {self.bound:g}"


@dataclass(frozen=True)
class Entry:
    """One line of the results: the median over the rounds, and the lowest and highest round.

    `ratio` is None for a quantity as it was measured, and "numerator ÷ denominator" for a ratio of two of them.
    """

    name: str
    value: float
    low: float
    high: float
    unit: str
    num_rounds: int
    ratio: str | None = None
    goal: Goal | None = None


def interleave(variants: Mapping[str, Variant], num_rounds: int, tick: Callable[[str], None]) -> Samples:
    """Run every variant once per round, in turns forth and back; quantities are named `variant.quantity`."""
    samples: dict[str, list[float]] = {}
    forth = list(variants.items())
    for number in range(num_rounds):
        for name, variant in forth if number % 2 == 0 else reversed(forth):
            tick(name)
            for quantity, value in variant().items():
                samples.setdefault(f"{name}.{quantity}", []).append(value)
    return samples


def quantity(name: str, samples: Samples, unit: str, goal: Goal | None = None) -> Entry:
    """A measured quantity."""
    return _entry(name, samples[name], unit, None, goal)


def ratio(name: str, samples: Samples, numerator: str, denominator: str, goal: Goal | None = None) -> Entry:
    """The quotient of two quantities, taken round by round."""
    quotients = [a / b for a, b in zip(samples[numerator], samples[denominator], strict=True)]
    return _entry(name, quotients, "ratio", f"{numerator} ÷ {denominator}", goal)


def _entry(name: str, values: Sequence[float], unit: str, of: str | None, goal: Goal | None) -> Entry:
    return Entry(name, median(values), min(values), max(values), unit, len(values), of, goal)
