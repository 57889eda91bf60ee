"""What one step computes: the scheduler writes it, the runner carries it out. Knows neither of them, and no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.engine.sequence import Sequence


@dataclass(frozen=True)
class Work:
    """Compute tokens [position, position + num_tokens) of a sequence. `samples`: its last logits choose a token."""

    sequence: Sequence
    num_tokens: int
    is_prefill: bool
    samples: bool


@dataclass
class Plan:
    """One step's work, prefills before decodes, and the sequences whose adapter could not be had."""

    prefills: list[Work] = field(default_factory=list)
    decodes: list[Work] = field(default_factory=list)
    rejected: list[tuple[Sequence, Exception]] = field(default_factory=list)

    @property
    def work(self) -> list[Work]:
        return self.prefills + self.decodes
