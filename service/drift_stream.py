"""One tenant's traffic through one adapter: its monitors, its signals, and which prompts count. No engine, no SQL.

Not safe for several threads: `service.drift_streams` holds a lock around every call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from service.drift_answers import answer_values
from service.drift_events import DriftEvent
from service.drift_intake import Answered, StreamKey
from service.drift_monitors import AnswerMonitor, PromptMonitor
from service.drift_rows import Blobs
from service.drift_sampling import Sampling, Skipped
from service.drift_states import INPUT_SIGNALS, OUTPUT_SIGNALS, DriftState, Reading, SignalState
from service.drift_view import Acknowledgement, StreamView

Change = tuple[SignalState, SignalState]
"""A signal before and after it changed its state."""


@dataclass
class DriftStream:
    """`prompts` is None while there is nothing to compare them with; then `kept_prompts` is what the monitor left.

    `prompt_run_length` and `answer_run_length` are what each monitor promises.
    """

    view: StreamView
    sampling: Sampling
    salt: bytes
    prompts: PromptMonitor | None
    answers: AnswerMonitor
    prompt_run_length: float | None
    answer_run_length: float
    expects_json: bool = False
    kept_prompts: bytes | None = None
    may_calibrate: bool = True
    is_dirty: bool = False
    unsaved: list[DriftEvent] = field(default_factory=list)

    @property
    def key(self) -> StreamKey:
        return (self.view.tenant_id, self.view.digest)

    @property
    def needs_calibration(self) -> bool:
        """Its first answers are there, and nobody has computed thresholds for what follows."""
        return self.may_calibrate and self.answers.needs_calibration

    def skips(self, answered: Answered, now: float) -> Skipped | None:
        """Whether this one is not looked at."""
        self.view = replace(self.view, model=answered.model, seen_at=now)
        self.is_dirty = True
        return self.sampling.skips(answered.prompt_digest, answered.turn.user)

    def answered(self, answered: Answered, now: float) -> list[Change]:
        values = answer_values(answered, expects_json=self.expects_json)
        self.view = replace(self.view, samples=self.view.samples + 1)
        return self._read(self.answers.observe(values), now)

    def prompted(self, embedding: NDArray[np.float32], nll: float | None, length: int, now: float) -> list[Change]:
        if self.prompts is None:
            return []
        known = {"prompt_length": float(length)} | ({} if nll is None else {"prompt_nll": nll})
        return self._read(self.prompts.observe(embedding, known), now)

    def settle(self, was: StreamView, now: float) -> list[Change]:
        """After it was loaded: what another base than the last time has changed, `was` being what was kept."""
        return self._moved([replace(after, since=_since(was, after, now)) for after in self.view.signals.values()], was)

    def acknowledge(self, signals: Iterable[str], given: Acknowledgement) -> None:
        """They begin again, and it is kept who said so."""
        for name in signals:
            monitor = self.prompts if name in INPUT_SIGNALS else self.answers
            if monitor is not None and name in monitor.signals:
                monitor.reset(name)
            before = self.view.signals[name]
            self._put(before.begin_again(given.at))
            self.unsaved.append(self._event(before, self.view.signals[name], given.at, given))
            self.view = replace(self.view, acknowledged={**self.view.acknowledged, name: given})

    def expected_alarms(self, *, of_prompts: bool) -> float:
        """False ones that the promise allows for one more observation; none while an alarm stands or nothing is
        known."""
        run_length = self.prompt_run_length if of_prompts else self.answer_run_length
        found = [self.view.signals[name] for name in (INPUT_SIGNALS if of_prompts else OUTPUT_SIGNALS)]
        if not run_length or any(signal.state is DriftState.DRIFT for signal in found):
            return 0.0
        return 1.0 / run_length if any(signal.ratio is not None for signal in found) else 0.0

    def blobs(self) -> Blobs:
        prompts = self.kept_prompts if self.prompts is None else self.prompts.state_dict()
        return Blobs(self.salt, self.sampling.state(), prompts, self.answers.state_dict())

    def _read(self, readings: Sequence[Reading], now: float) -> list[Change]:
        was = self.view
        known = [reading for reading in readings if reading.signal in was.signals]
        return self._moved([was.signals[reading.signal].read(reading, now) for reading in known], was)

    def _moved(self, signals: Sequence[SignalState], was: StreamView) -> list[Change]:
        changes = []
        for after in signals:
            self._put(after)
            before = was.signals[after.signal]
            if after.state is not before.state:
                changes.append((before, after))
                self.unsaved.append(self._event(before, after, after.since))
        return changes

    def _put(self, signal: SignalState) -> None:
        self.view = replace(self.view, signals={**self.view.signals, signal.signal: signal})
        self.is_dirty = True

    def _event(
        self, before: SignalState, after: SignalState, at: float, given: Acknowledgement | None = None
    ) -> DriftEvent:
        """An acknowledgement tells the numbers that were acknowledged."""
        told = after if given is None else before
        return DriftEvent(
            *(self.view.tenant_id, self.view.model, self.view.digest, after.signal, after.state, before.state),
            *(told.statistic, told.threshold, told.samples, at),
            by=None if given is None else given.by,
            note=None if given is None else given.note,
        )


def _since(was: StreamView, after: SignalState, now: float) -> float:
    return after.since if after.state is was.signals[after.signal].state else now
