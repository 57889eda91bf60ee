"""What a test says after an observation. Knows not how it was computed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """`statistic` is None while too little was observed to say anything; `samples` counts what this signal has seen
    since it began. A statistic of the MMD may lie below 0: the window is nearer to the reference than chance."""

    signal: str
    statistic: float | None
    threshold: float | None
    samples: int
    alarm: bool

    @property
    def ratio(self) -> float | None:
        """Statistic over threshold, an alarm from 1 on; None while unknown."""
        if self.statistic is None or self.threshold is None:
            return None
        return self.statistic / self.threshold
