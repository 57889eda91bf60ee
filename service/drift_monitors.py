"""Where the watch meets the statistics: what it asks of a monitor, and how it gets one. Computes nothing itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adapters.adapter_files import AdapterSource
from adapters.drift.monitor import InputMonitor, OutputMonitor
from adapters.drift.reference import DriftReference, read_reference
from service.drift_intake import StreamKey
from service.drift_states import Reading

Values = Mapping[str, float | None]
"""By signal; None for what was not measured."""

Known = Mapping[str, float]
"""By signal; what was not measured is left out."""


class Reference(Protocol):
    """What prompts looked like at training."""

    @property
    def basis(self) -> str: ...
    @property
    def run_length(self) -> float: ...


class PromptMonitor(Protocol):
    @property
    def signals(self) -> tuple[str, ...]: ...
    def observe(self, embedding: NDArray[np.float32], values: Known, /) -> Sequence[Reading]: ...
    def state_dict(self) -> bytes: ...
    def reset(self, signal: str | None = None) -> None: ...


class AnswerMonitor(Protocol):
    @property
    def signals(self) -> tuple[str, ...]: ...
    @property
    def needs_calibration(self) -> bool: ...
    def observe(self, values: Values, /) -> Sequence[Reading]: ...
    def state_dict(self) -> bytes: ...
    def reset(self, signal: str | None = None) -> None: ...


class Monitors(Protocol):
    """Makes them, new or as they stood."""

    run_length: float

    def reference(self, source: AdapterSource) -> Reference | None:
        """None when the adapter has none. Raises AdapterError for one that cannot be read."""

    def of_prompts(self, reference: Reference, state: bytes | None) -> PromptMonitor: ...

    def of_answers(self, key: StreamKey, state: bytes | None) -> AnswerMonitor: ...


def seed_of(key: StreamKey) -> int:
    """Of the lots that its answer monitor draws: the same after a restart."""
    return int.from_bytes(hashlib.sha256("\0".join(key).encode()).digest()[:4], "big")


class CalibratedMonitors:
    """The real ones."""

    def __init__(self, run_length: float) -> None:
        self.run_length = run_length

    def reference(self, source: AdapterSource) -> DriftReference | None:
        return read_reference(source)

    def of_prompts(self, reference: Reference, state: bytes | None) -> PromptMonitor:
        assert isinstance(reference, DriftReference)
        return InputMonitor(reference, state)

    def of_answers(self, key: StreamKey, state: bytes | None) -> AnswerMonitor:
        return OutputMonitor(self.run_length, seed_of(key), state)
