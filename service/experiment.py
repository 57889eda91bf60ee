"""A canary or a shadow of an alias, as a value: what runs, how it is judged, how it ended. Knows no SQL and no HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from service.intervals import Moments


class ExperimentKind(StrEnum):
    """A canary answers a share of the alias's users; a shadow answers copies of requests, for nobody to see."""

    CANARY = "canary"
    SHADOW = "shadow"


class Arm(StrEnum):
    """One side of an experiment. `stable` is what the alias points at."""

    STABLE = "stable"
    CANARY = "canary"
    SHADOW = "shadow"


class Outcome(StrEnum):
    """How an experiment ended. Superseded: the alias itself moved, so there is nothing left to compare with."""

    PROMOTED = "promoted"
    ROLLED_BACK = "rolled_back"
    ABORTED = "aborted"
    SUPERSEDED = "superseded"
    ALIAS_DELETED = "alias_deleted"


class Measure(StrEnum):
    """What is summed up for each arm. The first three, `agreed` and `dropped` are of 0s and 1s."""

    ERROR = "error"
    ABORTED = "aborted"
    LENGTH = "length"
    SECONDS = "seconds"
    TOKENS = "tokens"
    DOWN = "down"
    RATING = "rating"
    NLL = "nll"
    AGREED = "agreed"
    DROPPED = "dropped"
    SECONDS_DIFFERENCE = "seconds_difference"
    TOKENS_DIFFERENCE = "tokens_difference"


_OF_ANSWERS = (Measure.ERROR, Measure.ABORTED, Measure.LENGTH, Measure.SECONDS, Measure.TOKENS)
_OF_COPIES = (Measure.LENGTH, Measure.SECONDS, Measure.TOKENS, Measure.NLL)

MEASURES: Mapping[ExperimentKind, Mapping[Arm, tuple[Measure, ...]]] = {
    ExperimentKind.CANARY: {arm: (*_OF_ANSWERS, Measure.DOWN, Measure.RATING) for arm in (Arm.STABLE, Arm.CANARY)},
    ExperimentKind.SHADOW: {
        Arm.STABLE: _OF_COPIES,
        Arm.SHADOW: (
            *_OF_COPIES,
            *(Measure.ERROR, Measure.AGREED, Measure.DROPPED),
            *(Measure.SECONDS_DIFFERENCE, Measure.TOKENS_DIFFERENCE),
        ),
    },
}
"""Which measures each arm of each kind has."""

Measured = Mapping[tuple[Arm, Measure], Moments]
"""What an experiment has shown so far; every measure of its kind is there."""


@dataclass(frozen=True)
class CanaryPolicy:
    """When a canary ends by itself.

    `alpha` bounds the probability that one that is no worse is ever rolled back, however long it runs. The increases
    are of shares from 0 to 1: of answers that failed, and of thumbs down, where a rating r counts as (1 - r) / 2 of
    one. Up to the maximum they are tolerated. Nothing is decided on fewer than `min_samples` on either side.
    """

    min_samples: int = 20
    alpha: float = 0.05
    max_error_increase: float = 0.0
    max_down_increase: float = 0.0
    auto_promote: bool = False
    promote_margin: float = 0.05


@dataclass(frozen=True)
class Experiment:
    """`policy` is of a canary only; `outcome`, `reason` and `ended_at` are None while it runs."""

    id: str
    tenant_id: str
    alias: str
    kind: ExperimentKind
    stable_model: str
    stable_digest: str
    model: str
    digest: str
    percent: float
    policy: CanaryPolicy | None
    created_at: float
    outcome: Outcome | None = None
    reason: str | None = None
    ended_at: float | None = None

    @property
    def is_running(self) -> bool:
        return self.outcome is None
