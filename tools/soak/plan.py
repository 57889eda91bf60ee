"""How long a soak runs, and when what is killed. Knows no service."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

LONG_MINUTES = 5.0
"""From here on memory is judged: a shorter run is warming up for most of its time."""


class Act(StrEnum):
    KILL_ENGINE = "kill the engine's process"
    KILL_SERVICE = "kill the service"
    QUIET = "wait until all is quiet and look"
    MEASURE = "begin to measure memory"
    MEASURED = "end measuring memory"


@dataclass(frozen=True)
class Plan:
    minutes: float
    num_tenants: int = 30
    seed: int = 20
    flood_factor: int = 10
    """Requests of the flood, in multiples of what the queue holds."""

    @property
    def seconds(self) -> float:
        return self.minutes * 60.0

    @property
    def judges_memory(self) -> bool:
        return self.minutes >= LONG_MINUTES

    @property
    def timeline(self) -> tuple[tuple[float, Act], ...]:
        """Seconds of traffic, in order. The last third of a kill-free life is what memory is measured in; a
        fourth death of the engine within ten minutes would end the service, as it should."""
        if self.judges_memory:
            shares = [
                (0.04, Act.KILL_ENGINE),
                (0.07, Act.KILL_SERVICE),
                (0.12, Act.KILL_ENGINE),
                (0.16, Act.KILL_ENGINE),
                (0.20, Act.KILL_SERVICE),
                (0.27, Act.QUIET),
                (0.35, Act.MEASURE),
                (0.88, Act.MEASURED),
                (0.89, Act.KILL_ENGINE),
                (0.94, Act.KILL_ENGINE),
            ]
        else:
            shares = [
                (0.15, Act.KILL_ENGINE),
                (0.35, Act.KILL_SERVICE),
                (0.60, Act.QUIET),
                (0.62, Act.MEASURE),
                (0.85, Act.MEASURED),
                (0.86, Act.KILL_ENGINE),
            ]
        return tuple((share * self.seconds, act) for share, act in shares)
