"""Whether an adapter's answers still are what its first answers were, one answer at a time. Knows no text.

The first answers of a version are its own baseline; before there are enough, every signal is unknown. Numbers count
by their rank within the baseline, what happens or not by how much likelier it would be at other odds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from adapters.drift.reading import Reading

NUMBERS = ("answer_nll", "answer_entropy", "answer_length")
EVENTS = ("finish_length", "valid_json", "refusal")
BASELINE_SIZE = 200


class OutputMonitor:
    """The tests of one version's answers, with one promised `run_length` for all of them together."""

    def __init__(self, run_length: float, seed: int, state: bytes | None = None) -> None:
        raise NotImplementedError

    @property
    def signals(self) -> tuple[str, ...]:
        return (*NUMBERS, *EVENTS)

    @property
    def needs_calibration(self) -> bool:
        """The baseline is whole and has no thresholds yet."""
        raise NotImplementedError

    def calibrate(self, check: Callable[[], None]) -> None:
        """Thresholds for the baseline: seconds of CPU work. `check` is called often and may raise."""
        raise NotImplementedError

    def observe(self, signals: Mapping[str, float | None]) -> tuple[Reading, ...]:
        """What was not measured is left out or None; a signal that the baseline hardly has stays unknown."""
        raise NotImplementedError

    def readings(self) -> tuple[Reading, ...]:
        """As after the last observation."""
        raise NotImplementedError

    def reset(self, signal: str | None = None) -> None:
        """Begin again against the same baseline (None: all signals)."""
        raise NotImplementedError

    def state_dict(self) -> bytes:
        raise NotImplementedError
