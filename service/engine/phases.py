"""Where a sequence's time went: it queued, its adapter was loaded, its prompt was computed, its answer was written.

Made once, when the sequence ends, of the few times that it noted on its way. Knows no scheduler and no tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class PhaseName(StrEnum):
    """In the order in which they follow each other; a later one may be missing, never an earlier one but the second."""

    QUEUE = "queue"
    ADAPTER_LOAD = "adapter_load"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class Phase:
    """From `start` to `end`, both `time.monotonic()`, which all processes of a machine share."""

    name: PhaseName
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass
class PhaseTimes:
    """What a sequence notes, each once, however often it is preempted. None: it did not come to that.

    `adapter_wanted` is when its turn first came and its adapter was asked for, `adapter_ready` when that was in a slot;
    in between it may have been on its way, or every slot was in use.
    """

    adapter_wanted: float | None = None
    adapter_ready: float | None = None
    first_scheduled: float | None = None

    def phases(self, arrival: float, first_token: float | None, end: float) -> tuple[Phase, ...]:
        """One after the other without a gap, from `arrival` to `end`; a phase that took no time is left out."""
        return tuple(phase for phase in self._all(arrival, first_token, end) if phase.end > phase.start)

    def _all(self, arrival: float, first_token: float | None, end: float) -> Iterator[Phase]:
        started = end if self.first_scheduled is None else self.first_scheduled
        loading = started if self.adapter_wanted is None else self.adapter_wanted
        loaded = started if self.adapter_ready is None or self.first_scheduled is None else self.adapter_ready
        decoding = end if first_token is None else first_token
        yield Phase(PhaseName.QUEUE, arrival, loading)
        yield Phase(PhaseName.ADAPTER_LOAD, loading, loaded)
        yield Phase(PhaseName.PREFILL, loaded, decoding)
        yield Phase(PhaseName.DECODE, decoding, end)
