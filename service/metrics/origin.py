"""Where a sequence came from: the API operation, its trace, and who else wants to hear of its end. Knows no series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from service.engine.sequence import SequenceReport

INTERNAL_OPERATION = "internal"
"""What nobody asked for over HTTP: self-checks, evaluations."""


class SequenceListener(Protocol):
    """Called in a thread of the engine's: be quick."""

    def sequence_finished(self, report: SequenceReport) -> None: ...


@dataclass(frozen=True)
class Origin:
    """`trace_id` is what exemplars carry; `arrival` (`time.monotonic()`) when the request reached the service, before
    its prompt was made of it; `listener` the request's trace, where traces are made."""

    operation: str
    trace_id: str
    arrival: float | None = None
    listener: SequenceListener | None = None

    @property
    def exemplar(self) -> dict[str, str]:
        return {"trace_id": self.trace_id}
