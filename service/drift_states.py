"""What is known of one signal: four states, and how readings move between them. Knows no statistic, no database.

    insufficient_data --a reading--> ok --an alarm--> drift --calm for long--> ok
                                                        drift --acknowledged--> insufficient_data
    any, while the base is not the reference's --> stale_reference

An alarm is believed at once: its threshold is calibrated, and waiting would break that promise. The way back takes
`CALM_SAMPLES` readings in a row that are clearly below the threshold, so a signal at its edge does not flap.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

INPUT_SIGNALS = ("prompt_embedding", "prompt_length", "prompt_nll")
OUTPUT_SIGNALS = ("answer_nll", "answer_entropy", "answer_length", "finish_length", "valid_json", "refusal")
SIGNALS = (*INPUT_SIGNALS, *OUTPUT_SIGNALS)

CALM_RATIO = 0.75
"""Of the threshold: what lies below is calm."""

CALM_SAMPLES = 64
"""The longest window: nothing of the drift is in it any more."""


class DriftState(StrEnum):
    """In the order of how much they matter, the least first."""

    INSUFFICIENT_DATA = "insufficient_data"
    OK = "ok"
    STALE_REFERENCE = "stale_reference"
    DRIFT = "drift"

    @property
    def severity(self) -> int:
        return list(DriftState).index(self)


class Reading(Protocol):
    """What a monitor says after an observation: `adapters.drift.monitor.Reading`."""

    @property
    def signal(self) -> str: ...
    @property
    def statistic(self) -> float | None: ...
    @property
    def threshold(self) -> float | None: ...
    @property
    def samples(self) -> int: ...
    @property
    def alarm(self) -> bool: ...


@dataclass(frozen=True)
class SignalState:
    """`since` when it has been in this state, in unix seconds; `num_calm` readings in a row have been calm."""

    signal: str
    state: DriftState = DriftState.INSUFFICIENT_DATA
    statistic: float | None = None
    threshold: float | None = None
    samples: int = 0
    since: float = 0.0
    num_calm: int = 0

    @property
    def ratio(self) -> float | None:
        """Statistic over threshold; None while either is unknown."""
        if self.statistic is None or not self.threshold:
            return None
        return self.statistic / self.threshold

    def read(self, reading: Reading, now: float) -> SignalState:
        """After another reading."""
        seen = replace(
            self, statistic=reading.statistic, threshold=reading.threshold, samples=reading.samples, num_calm=0
        )
        if reading.alarm:
            return seen.enter(DriftState.DRIFT, now)
        if self.state is DriftState.DRIFT:
            num_calm = self.num_calm + 1 if seen.ratio is not None and seen.ratio < CALM_RATIO else 0
            if num_calm < CALM_SAMPLES:
                return replace(seen, num_calm=num_calm)
        return seen.enter(DriftState.INSUFFICIENT_DATA if seen.ratio is None else DriftState.OK, now)

    def enter(self, state: DriftState, now: float) -> SignalState:
        return self if state is self.state else replace(self, state=state, since=now, num_calm=0)

    def begin_again(self, now: float) -> SignalState:
        """Nothing is known yet."""
        return SignalState(self.signal, self.state, since=self.since).enter(DriftState.INSUFFICIENT_DATA, now)

    def outdate(self, now: float) -> SignalState:
        """The reference does not fit the base: no statistic is shown that would mean nothing."""
        return SignalState(self.signal, self.state, since=self.since).enter(DriftState.STALE_REFERENCE, now)
