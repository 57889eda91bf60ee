"""What there is to see of a stream: its signals, their states, who acknowledged what. Values only; knows no SQL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from service.drift_states import INPUT_SIGNALS, OUTPUT_SIGNALS, SIGNALS, DriftState, SignalState


class ReferenceState(StrEnum):
    """Whether prompts can be compared with those of the training. Stale: made with another base or quantization."""

    OK = "ok"
    STALE = "stale"
    NONE = "none"

    @classmethod
    def of(cls, reference_basis: str | None, basis: str) -> ReferenceState:
        if reference_basis is None:
            return cls.NONE
        return cls.OK if reference_basis == basis else cls.STALE


@dataclass(frozen=True)
class Acknowledgement:
    """`by` is the id of an API key."""

    at: float
    by: str
    note: str | None


@dataclass(frozen=True)
class StreamView:
    """One adapter's traffic. `samples` counts the answers looked at; times in unix seconds. `basis` is the base's
    when it last ran, `reference_basis` that of the adapter's reference."""

    id: str | None
    tenant_id: str
    digest: str
    model: str
    basis: str
    reference_basis: str | None
    samples: int = 0
    created_at: float | None = None
    seen_at: float | None = None
    signals: Mapping[str, SignalState] = field(default_factory=lambda: {name: SignalState(name) for name in SIGNALS})
    acknowledged: Mapping[str, Acknowledgement] = field(default_factory=dict)

    @property
    def reference(self) -> ReferenceState:
        return ReferenceState.of(self.reference_basis, self.basis)

    @property
    def state(self) -> DriftState:
        """The one that matters most."""
        return max((signal.state for signal in self.signals.values()), key=lambda state: state.severity)

    def on(self, basis: str) -> StreamView:
        """As it has to be seen while this base is loaded, even if nothing has come in since it was changed."""
        seen = replace(self, basis=basis)
        moved = dict(self.signals)
        if seen.reference is ReferenceState.STALE:
            moved |= {name: moved[name].outdate(moved[name].since) for name in INPUT_SIGNALS}
        elif self.reference is ReferenceState.STALE:
            moved |= {name: moved[name].begin_again(moved[name].since) for name in INPUT_SIGNALS}
        if basis != self.basis:
            moved |= {name: moved[name].begin_again(moved[name].since) for name in OUTPUT_SIGNALS}
        return replace(seen, signals=moved)
